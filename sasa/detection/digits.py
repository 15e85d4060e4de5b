"""A detection set that can be had everywhere: handwritten digits of DIGITS on canvases, in COCO's format.

Each canvas shows up to 6 digits; which ones, where, how large, how bright and how far they overlap are functions of the
seed. Training canvases use DIGITS' training images only, validation canvases its test images only. A digit's box is
that of its ink, as COCO's boxes are those of the object's pixels.
"""

import json
import os
import secrets
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import preprocess
from preprocess import DataError
from sasa.files import read_regular

CANVAS = 128  # pixels, both sides
COUNTS = {"train": 2000, "val": 400}  # canvases
SEED = 0
VERSION = 1  # of what is drawn: a folder of another version is not used
MOST_DIGITS, SIDES, CONTRAST = 6, (24, 64), (0.6, 1.0)  # a canvas; pixels of a whole 8x8 image; of its brightness
INK = 64  # of 255, before the contrast: what belongs to the digit
LARGEST_OVERLAP = 0.15  # of two boxes' intersection, as a share of the smaller box
TRIES = 30  # places tried for a digit before it is left out
FOLDER = "digits-detection"
ABOUT = {"description": "digits of DIGITS on canvases", "version": VERSION, "seed": SEED, "canvases": COUNTS}


class Canvas(NamedTuple):
    """pixels (CANVAS, CANVAS) uint8; boxes (n, 4) of x, y, width, height; areas (n,) of ink; labels (n,)."""

    pixels: np.ndarray
    boxes: list[list[int]]
    areas: list[int]
    labels: list[int]


def draw_canvas(images: torch.Tensor, labels: torch.Tensor, random: np.random.Generator) -> Canvas:
    """One canvas with 1 to MOST_DIGITS of the digits.

    Args:
        images: (n, 1, 8, 8) uint8. labels: (n,) int64.
    """
    canvas = Canvas(np.zeros((CANVAS, CANVAS), np.uint8), [], [], [])
    for _ in range(random.integers(1, MOST_DIGITS + 1)):
        which = int(random.integers(len(labels)))
        side = round(float(np.exp(random.uniform(*np.log(SIDES)))))
        contrast = random.uniform(*CONTRAST)
        digit = F.interpolate(images[which][None].float(), (side, side), mode="bilinear")[0, 0].numpy()
        rows, columns = (np.flatnonzero((digit >= INK).any(axis)) for axis in (1, 0))
        digit = digit[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        height, width = digit.shape
        for _ in range(TRIES):
            x, y = int(random.integers(CANVAS - width + 1)), int(random.integers(CANVAS - height + 1))
            if all(_overlap((x, y, width, height), box) <= LARGEST_OVERLAP for box in canvas.boxes):
                part = canvas.pixels[y : y + height, x : x + width]
                np.maximum(part, np.rint(digit * contrast).astype(np.uint8), out=part)
                canvas.boxes.append([x, y, width, height])
                canvas.areas.append(int((digit >= INK).sum()))
                canvas.labels.append(int(labels[which]))
                break
    return canvas


def _overlap(a: tuple[int, ...], b: list[int]) -> float:
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    return max(width, 0) * max(height, 0) / min(a[2] * a[3], b[2] * b[3])


def make(data_dir: Path) -> Path:
    """The set's folder below data_dir, drawn if it is not there yet; it appears whole or not at all.

    Raises:
        DataError: a folder of that name holds something else, or cannot be written.
    """
    folder = data_dir / FOLDER
    try:
        if not folder.exists():
            temporary = data_dir / f".{FOLDER}.{secrets.token_hex(8)}.tmp"
            try:
                _write(temporary)
                os.rename(temporary, folder)
            except FileExistsError:  # another process was faster
                pass
            except OSError as error:
                if not folder.exists():  # a folder that is not empty has other codes on other systems
                    raise error from None
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
        about = json.loads(read_regular(folder / "about.json", 2**20))
    except OSError as error:
        raise DataError(f"{error.filename or folder}: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"{folder / 'about.json'}: damaged; delete {folder} to draw it anew") from error
    if about != ABOUT:
        raise DataError(f"{folder}: drawn by another version; delete it to draw it anew")
    return folder


def _write(folder: Path) -> None:
    info, train, _, test = preprocess.load(dataset="DIGITS")
    (folder / "annotations").mkdir(parents=True)
    for number, (split, source) in enumerate((("train", train), ("val", test))):
        (folder / f"{split}2017").mkdir()
        document = {
            "info": ABOUT,
            "images": [],
            "annotations": [],
            "categories": [{"id": i + 1, "name": name} for i, name in enumerate(info.class_names)],
        }
        for i in range(COUNTS[split]):
            random = np.random.default_rng(np.random.SeedSequence(SEED, spawn_key=(number, i)))
            canvas = draw_canvas(source.images, source.labels, random)
            name = f"{i + 1:012}.png"
            Image.fromarray(canvas.pixels).save(folder / f"{split}2017" / name)
            document["images"].append({"id": i + 1, "file_name": name, "width": CANVAS, "height": CANVAS})
            for box, area, label in zip(canvas.boxes, canvas.areas, canvas.labels, strict=True):
                annotation = {"id": len(document["annotations"]) + 1, "image_id": i + 1, "category_id": label + 1}
                document["annotations"].append(annotation | {"bbox": box, "area": area, "iscrowd": 0})
        path = folder / "annotations" / f"instances_{split}2017.json"
        path.write_text(json.dumps(document), encoding="utf-8")
    (folder / "about.json").write_text(json.dumps(ABOUT), encoding="utf-8")
