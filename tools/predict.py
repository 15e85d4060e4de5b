"""Classify images with a trained network: a file of the most probable classes, and a table of the first ones.

    python -m tools.predict CHECKPOINT PATH... [--top-k 5] [--format csv|json] [--output FILE]

PATH is an image, a folder (searched for images at every depth) or a quoted pattern such as 'photos/**/*.jpg'. Images
are prepared as the checkpoint's own run prepares them for evaluation; --eval-size, --eval-crop and --eval-interpolation
change that. A file that cannot be read is named, counted and left out.
"""

import argparse
import csv
import functools
import glob
import io
import json
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from tqdm import tqdm

from config import FIELDS, Config, ConfigError
from preprocess import DataError, DataInfo, FolderData, WorkerError
from sasa import files
from sasa.console import Parser, as_path, as_path_text, print_error, printable, run_main, show
from sasa.data.decode import EXTENSIONS
from sasa.data.images import Evaluated, Files
from sasa.data.trees import is_hidden
from sasa.settings import parse_value
from sasa.training.checkpoint import CheckpointError
from sasa.training.device import amp_of_checkpoint, autocast_in, decoding_processes, pick_device, set_fp32_precision
from sasa.training.network import load_network
from tools.arguments import positive
from tools.own_images import EVALUATION, as_in_the_set, evaluated

PROG = "tools.predict"
TABLE_ROWS, TABLE_CLASSES, NAME_WIDTH = 20, 3, 60
MARKS = {"csv": b"path,class_1,probability_1", "json": b'{\n  "content": "sasa predictions"'}  # how our files begin
WORKERS_FROM = 64  # images that are worth processes to decode them


class Prediction(NamedTuple):
    """Of one image: the class numbers and their probabilities, most probable first."""

    path: str
    classes: list[int]
    probabilities: list[float]


def parse(arguments: list[str] | None) -> tuple[Parser, argparse.Namespace]:
    parser = Parser(
        "python -m tools.predict",
        description="Classify images with a trained network.",
        epilog="exit code: 0 done; 1 the network gives NaN or infinity, or a decoding process died; "
        "2 wrong usage, or no image could be read",
    )
    parser.add_argument("checkpoint", type=as_path, metavar="CHECKPOINT", help="best.pt or last.pt of a run")
    parser.add_argument("paths", nargs="+", type=as_path_text, metavar="PATH",
                        help="image, folder of images, or quoted pattern")  # fmt: skip
    parser.add_argument("--top-k", type=positive, default=5, metavar="K", help="classes of each image (default: 5)")
    parser.add_argument("--format", choices=MARKS, default="csv", help="of the file (default: csv)")
    parser.add_argument("--output", type=as_path_text, metavar="FILE",
                        help="file to write; -: stdout, without the table (default: predictions.FORMAT)")  # fmt: skip
    parser.add_argument("--batch-size", type=positive, default=64, metavar="B", help="images at a time (default: 64)")
    parser.add_argument("--num-workers", metavar="N",
                        help=f"processes that decode (default: by CPUs, from {WORKERS_FROM} images on)")  # fmt: skip
    parser.add_argument("--eval-size", metavar="SIZE", help="side of the images fed, pixels (default: the run's)")
    parser.add_argument("--eval-crop", metavar="CROP",
                        help="share of the resized image that is fed, its centre (default: the run's)")  # fmt: skip
    parser.add_argument("--eval-interpolation", metavar="INTERPOLATION",
                        help="bilinear or bicubic, antialiased (default: the run's)")  # fmt: skip
    parser.add_argument("--amp", metavar="AMP", help="auto, off, bf16 or fp16 (default: the run's where it can be)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--progress", action=argparse.BooleanOptionalAction, default=True,
                        help="a progress bar on a terminal (default: on)")  # fmt: skip
    return parser, parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    parser, args = parse(arguments)
    to_stdout = args.output == "-"
    output = Path(args.output or f"predictions.{args.format}")
    try:
        if not to_stdout:
            check_output(output, MARKS[args.format])
        given = {
            key: parse_value(FIELDS[key], getattr(args, key)) for key in EVALUATION if getattr(args, key) is not None
        }
        (network, config, info), _ = load_network(args.checkpoint, backend="auto")
        device = pick_device(args.device)
        set_fp32_precision(config.matmul_precision)
        amp = amp_of_checkpoint(config.amp, device, None if args.amp is None else parse_value(FIELDS["amp"], args.amp))
        fed = evaluated(config, info, given)
        paths, skipped = find_images(args.paths)
        workers = decoding_processes(None, device) if len(paths) >= WORKERS_FROM else 0
        if args.num_workers is not None:
            workers = parse_value(FIELDS["num_workers"], args.num_workers)
        images = FolderData(Files(paths), [*range(len(paths))], info, device=device, num_workers=workers,
                            skip_bad_images=True, evaluated=fed)  # fmt: skip
        autocast = autocast_in(amp, device)
        bar = args.progress and sys.stderr.isatty()
        predictions = predict(network.to(device), images, paths, args.batch_size, args.top_k, autocast, bar)
        skipped += images.bad_images
        for line in skipped:
            print(f"skipped {printable(line)}", file=sys.stderr)
        if not predictions:
            none = "no image" if len(skipped) == 1 else f"none of {len(skipped)} images"
            parser.error(f"{none} could be read" if skipped else "no images")
        if args.format == "csv":
            content = csv_of(predictions, info)
        else:
            content = json_of(predictions, skipped, args.checkpoint, config, info, fed)
        if not to_stdout:
            with files.replacing(output) as file:
                file.write(content)
    except FloatingPointError as error:
        print_error(PROG, f"{args.checkpoint}: {error}")
        return 1
    except WorkerError as error:
        print_error(PROG, error)
        return 1
    except (ConfigError, DataError, CheckpointError, OSError) as error:
        parser.error(str(error))
    if to_stdout:
        show(content)
    else:
        bad = f", {len(skipped)} could not be read" if skipped else ""
        show("\n".join([*table(predictions, info), f"{counted(len(predictions))}{bad}: {printable(output)}"]))
    return 0


def check_output(path: Path, mark: bytes) -> None:
    """Raises ConfigError where a file would be replaced that this command did not write, or none can be written."""
    if not path.parent.is_dir():
        raise ConfigError(f"--output {path}: there is no folder {path.parent}")
    if not os.path.lexists(path):
        return
    if not path.is_file():
        raise ConfigError(f"--output {path}: is there already, and is not a file")
    with open(path, "rb") as file:
        start = file.read(len(mark))
    if start not in (mark, b""):
        raise ConfigError(f"--output {path}: is there already, and not written by this command; name another")


# ---- which images ---------------------------------------------------------------------------------------------------


def find_images(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Paths of files, each once, in the order given and by name within a folder or pattern; and what is none.

    The second list holds "path: what is wrong".
    """
    found: dict[tuple[str, str], str] = {}  # the path as it was given first, by its real folder and its name
    real = functools.cache(os.path.realpath)

    def add(path: str) -> None:
        folder, name = os.path.split(path)
        found.setdefault((real(folder or "."), name), path)

    wrong = []
    for argument in arguments:
        matches = [argument] if os.path.lexists(argument) else sorted(glob.glob(argument, recursive=True))
        if not matches:
            wrong.append(f"{argument}: no such file, and no file of that pattern")
        for path in matches:
            if os.path.isdir(path):
                inside = list(images_below(path))
                for image in inside:
                    add(image)
                if not inside and matches == [argument]:
                    wrong.append(f"{path}: no images in this folder")
            elif is_regular(path):
                add(path)
            else:
                wrong.append(f"{path}: is not a file that can be read")
    return list(found.values()), wrong


def images_below(folder: str) -> Iterator[str]:
    """Regular files with an image's extension at every depth, by name; linked folders are not entered.

    What training leaves out of a tree is left out: hidden files, and folders of file servers and archivers.
    """
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        for name in sorted(names):
            path = os.path.join(parent, name)
            if name.lower().endswith(EXTENSIONS) and not is_hidden(name) and is_regular(path):
                yield path


def is_regular(path: str) -> bool:
    """Whether it can be opened as a file: a FIFO or a device would hang."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False


# ---- what they show -------------------------------------------------------------------------------------------------


@torch.inference_mode()
def predict(
    network: nn.Module, images: FolderData, paths: list[str], batch_size: int, top_k: int, autocast, bar: bool
) -> list[Prediction]:
    """The predictions of those images that could be read, in order; an image's label is its number in `paths`.

    Raises:
        WorkerError: a decoding process died.
        FloatingPointError: outputs that are not finite.
    """
    top_k = min(top_k, images.info.num_classes)
    predictions = []
    try:
        with tqdm(total=len(paths), unit="images", disable=not bar, leave=False) as progress:
            for batch, index in images.eval_batches(batch_size):
                with autocast():
                    logits = network(as_in_the_set(batch, images.info))
                numbers = index.tolist()
                probabilities = logits.float().softmax(1).cpu()
                if not probabilities.isfinite().all():
                    bad = numbers[int((~probabilities.isfinite()).any(1).nonzero()[0])]
                    raise FloatingPointError(f"the network gives NaN or infinity for {printable(paths[bad])}")
                best = probabilities.topk(top_k)
                for i, classes, shares in zip(numbers, best.indices.tolist(), best.values.tolist(), strict=True):
                    predictions.append(Prediction(paths[i], classes, shares))
                progress.update(numbers[-1] + 1 - progress.n)
    except DataError:
        if len(images.bad_images) < len(paths):
            raise
    finally:
        images.close()
    return predictions


# ---- how they are written -------------------------------------------------------------------------------------------


def csv_of(predictions: list[Prediction], info: DataInfo) -> bytes:
    """One row an image: path, then class and probability of each of the most probable classes."""
    count = len(predictions[0].classes)
    rows = [["path", *(f"{name}_{i}" for i in range(1, count + 1) for name in ("class", "probability"))]]
    for path, classes, probabilities in predictions:
        pairs = ((info.class_names[c], f"{p:.6f}") for c, p in zip(classes, probabilities, strict=True))
        rows.append([path, *(cell for pair in pairs for cell in pair)])
    return "".join(map(csv_line, rows)).encode("utf-8", "surrogateescape")  # any bytes, as the file system has them


def csv_line(cells: list[str]) -> str:
    """The cells as a line of a CSV file, each exactly as it is."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\r\n").writerow(cells)  # older Pythons quote a \r only where lines end in one
    return text.getvalue().removesuffix("\r\n") + "\n"


def json_of(
    predictions: list[Prediction],
    skipped: list[str],
    checkpoint: Path,
    config: Config,
    info: DataInfo,
    fed: Evaluated,
) -> bytes:
    """With the network, the preparation of the images, and what could not be read."""
    preparation = fed._asdict() | {"mean": list(info.mean), "std": list(info.std)}
    content = {
        "content": "sasa predictions",
        "checkpoint": str(checkpoint),
        "model": config.model_name,
        "dataset": config.dataset,
        "preparation": preparation,
        "predictions": [
            {
                "path": path,
                "classes": [
                    {"class": info.class_names[c], "index": c, "probability": round(p, 6)}
                    for c, p in zip(classes, probabilities, strict=True)
                ],
            }
            for path, classes, probabilities in predictions
        ],
        "skipped": skipped,
    }
    return (json.dumps(content, indent=2, allow_nan=False) + "\n").encode()


def table(predictions: list[Prediction], info: DataInfo) -> Iterator[str]:
    """The first predictions, a line each, for a person."""
    shown = predictions[:TABLE_ROWS]
    names = [shorten(printable(prediction.path)) for prediction in shown]
    rows = [
        [f"{printable(info.class_names[c])} {p:.1%}" for c, p in zip(classes, probabilities, strict=True)]
        for _, classes, probabilities in shown
    ]
    columns = [*zip(*(row[:TABLE_CLASSES] for row in rows), strict=True)]
    widths = [max(map(len, names)), *(max(map(len, column)) for column in columns)]
    for name, row in zip(names, rows, strict=True):
        cells = (f"{cell:{width}}" for cell, width in zip([name, *row], widths, strict=False))
        yield "  ".join(cells).rstrip()
    if len(predictions) > len(shown):
        yield f"... and {len(predictions) - len(shown)} more"


def counted(images: int) -> str:
    return "1 image" if images == 1 else f"{images} images"


def shorten(name: str) -> str:
    return name if len(name) <= NAME_WIDTH else "..." + name[3 - NAME_WIDTH :]


if __name__ == "__main__":
    run_main(main)
