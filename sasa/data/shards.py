"""Image sets in tar shards, for file systems that hate a million small files: `--dataset WEBDATASET`.

    python preprocess.py pack TREE SHARDS                        an ImageFolder tree into shards, with their index
    python preprocess.py index 'SHARDS/train-{000000..000999}.tar'     the index of shards that came from elsewhere

A shard is an uncompressed tar as the package `webdataset` writes and reads them: members KEY.jpg (or another image's
suffix) and KEY.cls (the label in digits) side by side. Beside the shards lies an index of where each sample starts, so
that any sample is one read at a known place. Order, augmentation, hold-out, ranks and resume are then exactly those of
the tree, bitwise: nothing depends on how samples fell into shards. The price: shards are files of a mounted file system
(no http:, no pipe:), read at random places, about one image's bytes at a time.
"""

import argparse
import io
import os
import re
import sys
import tarfile
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sasa.console import one_line
from sasa.data.errors import DataError
from sasa.data.trees import read_trees

IMAGES_A_SHARD = 1000  # about 100 MB of ImageNet
OPEN_SHARDS = 128  # files that a process keeps open; usual limits are 1024
FORM = "members KEY.jpg and KEY.cls side by side, not compressed"


def _webdataset():
    """The package's modules that read and write tars. Raises DataError where it is not installed."""
    try:
        from webdataset import shardlists, tariterators, writer
    except ImportError:
        raise DataError("--dataset WEBDATASET: needs the package webdataset: pip install webdataset") from None
    return shardlists, tariterators, writer


class Sample(NamedTuple):
    """Where a sample lies: `size` bytes at `start` of a shard."""

    shard: int
    start: int
    size: int


class ShardFiles:
    """The images of shards, by number; a `Source`."""

    def __init__(self, shards: list[str], samples: np.ndarray) -> None:
        self.shards, self.samples = shards, samples  # samples (n, 3) int64: `Sample`s

    def __len__(self) -> int:
        return len(self.samples)

    def take(self, index: list[int]) -> "ShardFiles":
        return ShardFiles(self.shards, self.samples[index])

    def name(self, index: int) -> str:
        sample = Sample(*self.samples[index].tolist())
        return f"{self.shards[sample.shard]} at byte {sample.start}"

    def identities(self) -> list[bytes]:
        """Of each sample its shard's name, its place there and its size."""
        names = [os.fsencode(Path(shard).name) for shard in self.shards]
        return [names[shard] + b"\0%d\0%d" % (start, size) for shard, start, size in self.samples.tolist()]

    def open(self, index: int) -> io.BytesIO:
        """The image's file, whole, in memory."""
        sample = Sample(*self.samples[index].tolist())
        data = os.pread(_open(self.shards[sample.shard]).fileno(), sample.size, sample.start)  # no file position
        members = _webdataset()[1].tar_file_iterator(io.BytesIO(data))
        return next(io.BytesIO(member["data"]) for member in members if not member["fname"].endswith(".cls"))


@lru_cache(OPEN_SHARDS)
def _open(shard: str):
    return open(shard, "rb", buffering=0)  # closed when the cache drops it


# ---- reading a set --------------------------------------------------------------------------------------------------


def read_shards(pattern: str) -> tuple[list[str], tuple[ShardFiles, list[int]], tuple[ShardFiles, list[int]]]:
    """Classes, and (images, labels) of the training shards that the pattern names and of the validation shards.

    Validation shards: those beside them whose name has `val` for `train` and any number.
    Raises: DataError.
    """
    train = expand(pattern)
    name = Path(pattern).name
    if "train" not in name:
        raise DataError(
            f"--data-dir {pattern}: the shards' names must have `train`, where those of validation have val"
        )
    glob = re.sub(r"\{[^}]*\}|\d+", "*", name.replace("train", "val", 1))
    val = sorted(map(str, Path(pattern).parent.glob(glob)))
    if not val:
        raise DataError(f"--data-dir {pattern}: no validation shards {Path(pattern).parent / glob} beside it")
    classes, *part = _read_index(train)
    val_classes, *val_part = _read_index(val)
    if classes != val_classes:
        raise DataError(
            f"{pattern}: training and validation shards have different classes; pack or index them together"
        )
    return classes, tuple(part), tuple(val_part)


def expand(pattern: str) -> list[str]:
    """The shards that a pattern such as train-{000000..000999}.tar names. Raises DataError where one is missing."""
    shards = _webdataset()[0].expand_urls(pattern)
    for shard in shards:
        if not Path(shard).is_file():
            raise DataError(
                f"--data-dir {pattern}: no file {shard}; it must be like 'shards/train-{{000000..000999}}.tar'"
            )
    return shards


def index_path(shard: str) -> Path:
    """train-000017.tar -> train-index.npz"""
    return Path(shard).with_name(re.sub(r"[-_.]?\d*\.tar$", "", Path(shard).name) + "-index.npz")


def _read_index(shards: list[str]) -> tuple[list[str], ShardFiles, list[int]]:
    path = index_path(shards[0])
    try:
        with np.load(path, allow_pickle=False) as index:
            names, sizes = index["shards"].tolist(), index["shard_bytes"].tolist()
            samples, labels, classes = index["samples"], index["labels"], index["classes"].tolist()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; write it with: python preprocess.py index PATTERN") from None
    except Exception as error:  # damaged in whatever way
        raise DataError(f"{path}: damaged ({one_line(error)}); write it anew: python preprocess.py index") from error
    known = {name: (i, size) for i, (name, size) in enumerate(zip(names, sizes, strict=True))}
    number = np.full(len(names), -1)
    for i, shard in enumerate(shards):
        place, size = known.get(Path(shard).name, (0, -1))
        if Path(shard).stat().st_size != size:
            raise DataError(f"{shard}: not the file that {path} describes; write it anew: python preprocess.py index")
        number[place] = i
    samples = np.column_stack((number[samples[:, 0]], samples[:, 1:]))
    chosen = samples[:, 0] >= 0
    return classes, ShardFiles(shards, samples[chosen]), labels[chosen].tolist()


# ---- writing --------------------------------------------------------------------------------------------------------


def pack(tree: Path, folder: Path, images_a_shard: int = IMAGES_A_SHARD) -> list[str]:
    """Shards of an ImageFolder tree (train/, val/), its files as they are in the tree's order, and their index.

    Returns a line for each split. Raises: DataError.
    """
    classes, *splits, _ = read_trees("FOLDER", tree)
    writer = _webdataset()[2]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for split, (images, labels) in zip(("train", "val"), splits, strict=True):
            if next(folder.glob(f"{split}-*.tar"), None) is not None:
                raise DataError(f"{folder}: already holds shards of {split}; remove them or name another folder")
            pattern = str(folder / f"{split}-%06d.tar").replace("%", "%%").replace("%%06d", "%06d")
            options = {"encoder": False, "mtime": 0, "user": "", "group": ""}  # the same tree, the same bytes
            with writer.ShardWriter(pattern, maxcount=images_a_shard, verbose=0, **options) as sink:
                for i, label in enumerate(labels):
                    path = Path(images.name(i))
                    image = {path.suffix[1:].lower(): path.read_bytes()}
                    sink.write({"__key__": f"{i:08d}", **image, "cls": str(label).encode()})
        (folder / "classes.txt").write_text("".join(f"{name}\n" for name in classes), encoding="utf-8")
        return [write_index(sorted(map(str, folder.glob(f"{split}-*.tar")))) for split in ("train", "val")]
    except OSError as error:
        raise DataError(f"{folder}: {one_line(error)}") from error


def write_index(shards: list[str]) -> str:
    """Writes the index of these shards beside them; classes are of classes.txt there, or the labels' numbers.

    Returns what it found. Raises: DataError for a shard of another form.
    """
    samples, labels = [], []
    for number, shard in enumerate(shards):
        for start, size, label in _samples_of(shard):
            samples.append(Sample(number, start, size))
            labels.append(label)
    if not labels:
        raise DataError(f"{shards[0]}: no images in it; shards have {FORM}")
    path, names = index_path(shards[0]), Path(shards[0]).parent / "classes.txt"
    classes = (
        names.read_text(encoding="utf-8").splitlines() if names.exists() else list(map(str, range(max(labels) + 1)))
    )
    if max(labels) >= len(classes):
        raise DataError(f"{names}: {len(classes)} classes, but a label is {max(labels)}")
    temporary = path.with_name(f".{path.name}")
    np.savez(
        temporary, shards=[Path(shard).name for shard in shards], samples=np.array(samples), labels=np.array(labels),
        shard_bytes=[Path(shard).stat().st_size for shard in shards], classes=classes,
    )  # fmt: skip
    os.replace(temporary, path)
    return f"{path}: {len(labels)} images of {len(classes)} classes in {len(shards)} shards"


def _samples_of(shard: str):
    """(start, size, label) of each sample: the bytes of its members with their headers."""
    try:
        with tarfile.open(shard, "r:") as tar:
            for key, group in groupby(filter(tarfile.TarInfo.isreg, tar), lambda m: re.sub(r"\.[^/]*$", "", m.name)):
                members = list(group)
                suffixes = [member.name[len(key) + 1 :] for member in members]
                if len(members) != 2 or suffixes.count("cls") != 1:
                    raise DataError(f"{shard}: {key} has {', '.join(suffixes)}; shards have {FORM}")
                label = int(tar.extractfile(members[suffixes.index("cls")]).read())
                last = members[-1]
                yield members[0].offset, last.offset_data + -(-last.size // 512) * 512 - members[0].offset, label
    except (tarfile.TarError, OSError, ValueError) as error:
        raise DataError(f"{shard}: {one_line(error)}; shards have {FORM}") from error


def main(arguments: list[str] | None = None) -> int:
    """The command line of `python preprocess.py`."""
    parser = argparse.ArgumentParser(prog="preprocess.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="pack|index")
    packing = commands.add_parser("pack", help="write the shards of an ImageFolder tree, and their index")
    packing.add_argument("tree", type=Path, metavar="TREE", help="folder with train/CLASS/* and val/CLASS/*")
    packing.add_argument("folder", type=Path, metavar="SHARDS", help="folder of the shards")
    packing.add_argument("--images", type=int, default=IMAGES_A_SHARD, help="in a shard (default: %(default)s)")
    indexing = commands.add_parser("index", help="write the index of shards that came from elsewhere")
    indexing.add_argument("pattern", metavar="PATTERN", help="such as 'shards/train-{000000..000999}.tar'; val alike")
    args = parser.parse_args(arguments)
    try:
        if args.command == "pack" and args.images < 1:
            raise DataError(f"--images {args.images}: must be at least 1")
        lines = (
            pack(args.tree, args.folder, args.images) if args.command == "pack" else [write_index(expand(args.pattern))]
        )
    except DataError as error:
        print(f"preprocess.py: error: {error}", file=sys.stderr)
        return 2
    for line in lines:
        print(line)
    return 0
