"""Annotations in COCO's format, read and checked.

Wrong annotations are refused in one line, as a wrong box trains silently. What COCO's own files hold is taken as COCO's
evaluator takes it: ids of categories may have gaps; crowd boxes are not trained on, and in evaluation neither right nor
wrong; boxes that reach out of the image are cut for training; boxes without an area are left out of training, and are
objects that nobody can find in evaluation; images without boxes are trained on as background.
"""

import dataclasses
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from preprocess import DataError
from sasa.console import one_line, printable
from sasa.data.fingerprint import checksum, class_differences, class_order, fingerprint
from sasa.files import read_regular

LARGEST_SIDE = 30_000  # pixels of an image: beyond, a number is a mistake


@dataclass(frozen=True)
class CocoSplit:
    """The images of one purpose and what they show.

    Boxes of image i are the rows first[i]:first[i + 1]. `document` is what COCO's evaluator takes as the truth.
    """

    folder: Path
    files: tuple[str, ...]
    image_ids: np.ndarray  # (n,) int64
    sizes: np.ndarray  # (n, 2) int64: height, width
    first: np.ndarray  # (n + 1,) int64
    boxes: np.ndarray  # (boxes, 4) float32: x1, y1, x2, y2 inside the image, with an area
    labels: np.ndarray  # (boxes,) int64 from 0
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]  # of the labels 0, 1, ...
    crowds: int  # boxes that are not trained on: of crowds
    empty: int  # and without an area
    document: dict[str, Any]

    def __len__(self) -> int:
        return len(self.files)

    def targets(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Boxes (n, 4) and labels (n,) of an image."""
        part = slice(self.first[index], self.first[index + 1])
        return self.boxes[part], self.labels[part]

    def fingerprint(self) -> dict[str, Any]:
        """What the images are and show: of names, sizes, boxes and labels, not of pixels (`sasa.data.fingerprint`)."""

        names = map(os.fsencode, self.files)
        identities = (b"\0".join((name, *self._shown(i))) for i, name in enumerate(names))
        return fingerprint(identities, [0] * len(self), 0)

    def listed(self) -> Iterator[tuple[str, int, str]]:
        """Of each image the name, no label, and a checksum of its size, boxes and labels."""
        for index, name in enumerate(self.files):
            yield f"{self.folder.name}/{name}", 0, f"boxes of checksum {checksum(b''.join(self._shown(index)))}"

    def _shown(self, index: int) -> list[bytes]:
        return [values.tobytes() for values in (self.sizes[index], *self.targets(index))]


def relabelled(split: CocoSplit, names: tuple[str, ...]) -> CocoSplit:
    """The split whose labels are the places of their categories in `names`.

    Raises:
        DataError: it has other categories.
    """
    if split.class_names == names:
        return split
    order = class_order(list(names), list(split.class_names))
    if order is None:
        raise DataError("; ".join(class_differences(list(names), list(split.class_names))))
    ids = dict(zip(order, split.category_ids, strict=True))
    return dataclasses.replace(
        split, class_names=names, category_ids=tuple(ids[i] for i in range(len(names))),
        labels=np.array(order, np.int64)[split.labels],
    )  # fmt: skip


def read_split(data_dir: Path, split: str) -> CocoSplit:
    """data_dir/annotations/instances_<split>.json and the images of data_dir/<split>.

    Raises:
        DataError: missing or damaged files, and annotations that cannot be.
    """
    path, folder = data_dir / "annotations" / f"instances_{split}.json", data_dir / split
    document = _read_json(path)
    try:
        files, image_ids, sizes, place = _images(document["images"])
        category_ids, class_names = _categories(document["categories"])
        images, boxes, labels, crowd = _annotations(document["annotations"], place, category_ids)
    except DataError as error:
        raise DataError(f"{printable(path)}: {error}") from None
    _check_files(path, folder, files)
    height, width = sizes[images].T if len(images) else np.zeros((2, 0), np.int64)
    corners = np.stack((boxes[:, 0], boxes[:, 1], boxes[:, 0] + boxes[:, 2], boxes[:, 1] + boxes[:, 3]), axis=1)
    corners = np.clip(corners, 0, np.stack((width, height, width, height), axis=1)).astype(np.float32)
    area = (corners[:, 2] > corners[:, 0]) & (corners[:, 3] > corners[:, 1])
    kept = np.flatnonzero(area & ~crowd)
    kept = kept[np.argsort(images[kept], kind="stable")]
    counts = np.bincount(images[kept], minlength=len(files))
    return CocoSplit(
        folder, files, image_ids, sizes, np.concatenate(([0], np.cumsum(counts))), corners[kept], labels[kept],
        class_names, category_ids, int(crowd.sum()), int((~area & ~crowd).sum()), document,
    )  # fmt: skip


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(read_regular(path))
    except OSError as error:
        raise DataError(f"{printable(path)}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{printable(path)}: truncated or not JSON ({one_line(error, 100)})") from error
    if not isinstance(document, dict):
        raise DataError(f"{printable(path)}: not COCO annotations: an object with images, annotations and categories")
    for key in ("images", "annotations", "categories"):
        if not isinstance(document.get(key), list) or not all(isinstance(item, dict) for item in document[key]):
            raise DataError(f"{printable(path)}: not COCO annotations: no list of objects called {key}")
    return document


def _images(records: list[dict]) -> tuple[tuple[str, ...], np.ndarray, np.ndarray, dict[int, int]]:
    """Names, ids, sizes, and the place of each id."""
    if not records:
        raise DataError("it names no image")
    files, ids, sizes = [], [], []
    for record in records:
        number = _integer(record, "id", "an image")
        name = record.get("file_name")
        if not isinstance(name, str) or not name or os.path.isabs(name) or ".." in Path(name).parts or "\0" in name:
            raise DataError(f"image {number}: file_name {name!r} must be a path below the images' folder")
        size = [_integer(record, key, f"image {number}") for key in ("height", "width")]
        if not all(1 <= side <= LARGEST_SIDE for side in size):
            raise DataError(f"image {number}: height {size[0]} and width {size[1]} must be 1 to {LARGEST_SIDE}")
        files.append(name)
        ids.append(number)
        sizes.append(size)
    place = {number: i for i, number in enumerate(ids)}
    if len(place) != len(ids):
        raise DataError(f"image id {_repeated(ids)} is there twice")
    return tuple(files), np.array(ids), np.array(sizes), place


def _categories(records: list[dict]) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Ids in rising order, which are the labels 0, 1, ..., and their names."""
    if not records:
        raise DataError("it names no category")
    names = {_integer(record, "id", "a category"): record.get("name") for record in records}
    if len(names) != len(records):
        raise DataError(f"category id {_repeated([record['id'] for record in records])} is there twice")
    ids = tuple(sorted(names))
    return ids, tuple(names[i] if isinstance(names[i], str) else f"category {i}" for i in ids)


def _annotations(
    records: list[dict], place: dict[int, int], category_ids: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Of each box its image's place, (x, y, width, height), label and whether it is a crowd's.

    COCO's evaluator needs an id, an area and iscrowd of each: what is missing is put into the records.
    """
    label_of = {number: label for label, number in enumerate(category_ids)}
    images, boxes, labels, crowd, ids = [], [], [], [], []
    for i, record in enumerate(records):
        number = _integer(record, "id", "an annotation") if "id" in record else record.setdefault("id", i + 1)
        what = f"annotation {number}"
        image, category = _integer(record, "image_id", what), _integer(record, "category_id", what)
        if image not in place:
            raise DataError(f"{what} is of image {image}, which is not among the images")
        if category not in label_of:
            raise DataError(f"{what} is of category {category}, which is not among the categories")
        box = record.get("bbox")
        if not isinstance(box, list) or len(box) != 4 or not all(_finite(value) for value in box):
            raise DataError(f"{what}: bbox {one_line(box, 100)} must be four finite numbers, x, y, width, height")
        if box[2] < 0 or box[3] < 0:
            raise DataError(f"{what}: bbox {box} has a negative width or height")
        if record.setdefault("iscrowd", 0) not in (0, 1):
            raise DataError(f"{what}: iscrowd {one_line(record['iscrowd'], 100)} must be 0 or 1")
        if not _finite(record.setdefault("area", box[2] * box[3])) or record["area"] < 0:
            raise DataError(f"{what}: area {one_line(record['area'], 100)} must be a finite number of at least 0")
        images.append(place[image])
        boxes.append(box)
        labels.append(label_of[category])
        crowd.append(bool(record["iscrowd"]))
        ids.append(number)
    if len(set(ids)) != len(ids):
        raise DataError(f"annotation id {_repeated(ids)} is there twice")
    return (
        np.array(images, np.int64), np.array(boxes, np.float64).reshape(-1, 4), np.array(labels, np.int64),
        np.array(crowd, bool),
    )  # fmt: skip


def _check_files(path: Path, folder: Path, files: tuple[str, ...]) -> None:
    """Every image is there. One listing of each folder, since a question a file takes minutes on a network's disk."""
    try:
        there = {sub: set(os.listdir(folder / sub)) for sub in {os.path.dirname(name) for name in files}}
    except OSError as error:
        raise DataError(f"{printable(error.filename)}: {error.strerror}, where {path.name} has its images") from error
    missing = [name for name in files if os.path.basename(name) not in there[os.path.dirname(name)]]
    if missing:
        first = printable(folder / missing[0])
        raise DataError(f"{printable(path)}: {len(missing)} of {len(files)} images are missing, the first: {first}")


def _integer(record: dict, key: str, what: str) -> int:
    value = record.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or abs(value) >= 2**63:
        raise DataError(f"{what}: {key} {one_line(value, 100)} must be a whole number")
    return value


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9 and math.isfinite(value)


def _repeated(ids: list[int]) -> int:
    values, counts = np.unique(ids, return_counts=True)
    return int(values[counts > 1][0])
