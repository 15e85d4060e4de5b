"""Image sets in tar shards, for file systems that hate a million small files: `--dataset WEBDATASET`.

    python preprocess.py pack TREE SHARDS                        an ImageFolder tree into shards, with their index
    python preprocess.py index 'SHARDS/train-{000000..000999}.tar' 'SHARDS/val-{000000..000049}.tar'
                                                                 the index of shards that came from elsewhere

A shard is an uncompressed tar as the package `webdataset` writes and reads them: members KEY.jpg (or another image's
suffix) and KEY.cls (the label in digits) side by side. An index (`shard_index`) says where each image starts, so that
any of them is one read at a known place. Order, augmentation, hold-out, ranks and resume are then exactly those of the
tree, bitwise: nothing depends on how samples fell into shards. The price: shards are files of a mounted file system (no
http:, no pipe:), read at random places, about one image's bytes at a time.
"""

import contextlib
import io
import os
import re
import signal
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sasa.console import Parser, as_path, as_path_text, fail, print_error, printable, show
from sasa.data.class_files import read_classes
from sasa.data.errors import DataError
from sasa.data.pack import IMAGES_A_SHARD, pack
from sasa.data.shard_index import ANEW, expand, read_index, write_index, write_indexes

__all__ = ["DataError", "ShardFiles", "expand", "main", "pack", "read_shards", "write_index"]

_OPEN_SHARDS = 128  # files that a process keeps open; usual limits are 1024


class ShardFiles:
    """The images of shards, by number; a `Source`."""

    def __init__(self, shards: list[str], samples: np.ndarray) -> None:
        """`samples` (n, 3) int64: shard, first byte and bytes of each image."""
        self.shards, self.samples = shards, samples

    def __len__(self) -> int:
        return len(self.samples)

    def take(self, index: list[int]) -> "ShardFiles":
        return ShardFiles(self.shards, self.samples[index])

    def name(self, index: int) -> str:
        shard, start, _ = self.samples[index].tolist()
        return f"{self.shards[shard]} at byte {start}"

    def identities(self) -> list[bytes]:
        """Of each image its shard's name and its place there."""
        names = [os.fsencode(Path(shard).name) for shard in self.shards]
        return [names[shard] + b"\0%d" % start for shard, start, _ in self.samples.tolist()]

    def sizes(self) -> list[int]:
        """Of each image in bytes."""
        return self.samples[:, 2].tolist()

    def open(self, index: int) -> io.BytesIO:
        """The image's file, whole, in memory. Raises OSError."""
        shard, start, size = self.samples[index].tolist()
        data = os.pread(_open(self.shards[shard]).fileno(), size, start)  # leaves no file position behind
        if len(data) != size:
            raise OSError("the shard ends before the image does")
        return io.BytesIO(data)


@lru_cache(_OPEN_SHARDS)
def _open(shard: str):
    return open(shard, "rb", buffering=0)  # closed when the cache drops it


class Shards(NamedTuple):
    """What `read_shards` found: the classes, and (images, labels) of the two splits."""

    classes: list[str]
    train: tuple[ShardFiles, list[int]]
    val: tuple[ShardFiles, list[int]]


def read_shards(pattern: str, index_dir: Path | None = None) -> Shards:
    """The images of the training shards that the pattern names, and of the validation shards beside them.

    Validation shards: those whose name has `val` for `train` and any number.

    Args:
        index_dir: folder of the indexes; None is beside the shards, or the user's cache.

    Raises:
        DataError: shards or indexes that are not there, or do not fit together.
    """
    train, shown = expand(pattern), f"--data-dir {printable(pattern)}"
    val = _validation_shards(pattern, shown)
    of_train, of_val = read_index(train, index_dir), read_index(val, index_dir, is_whole=True)
    classes = of_train.classes
    if of_train.is_numbered and of_val.is_numbered:  # a split that lacks the last classes has the same numbers
        classes = max(classes, of_val.classes, key=len)
    elif classes != of_val.classes:
        raise DataError(
            f"{shown}: training and validation shards have different classes; index both in one command: python "
            "preprocess.py index TRAIN VAL, with their names in classes.txt or without any"
        )
    named, source = read_classes(Path(pattern).parent)
    if named not in (None, classes):
        raise DataError(f"{printable(source)}: other classes than those of the index; {ANEW} TRAIN VAL")
    labels = np.unique(of_train.labels)
    if len(labels) == 1:  # every answer would be right
        raise DataError(
            f"{shown}: all labels of these training shards are {labels[0]}, one class only: nothing to tell apart"
        )
    parts = ((ShardFiles(shards, of.samples), of.labels.tolist()) for shards, of in ((train, of_train), (val, of_val)))
    return Shards(classes, *parts)


def _validation_shards(pattern: str, shown: str) -> list[str]:
    folder, name = Path(pattern).parent, Path(pattern).name
    if "train" not in name:
        raise DataError(f"{shown}: the shards' names must have `train`, where those of validation have val")
    name = name.replace("train", "val", 1)
    form = "".join(
        r"[^/]*" if part.startswith("{") or part.isdigit() else re.escape(part)
        for part in re.split(r"(\{[^}]*\}|\d+)", name)
    )
    val = sorted(str(folder / found) for found in os.listdir(folder) if re.fullmatch(form, found, re.DOTALL))
    if not val:
        like = re.sub(r"\{[^}]*\}|\d+", "*", name)
        raise DataError(f"{shown}: no validation shards {printable(folder / like)} beside it")
    return val


# ---- the command ----------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    """The command line of `python preprocess.py`; returns the exit code, or ends with 2 for wrong usage or data."""
    parser = Parser("preprocess.py", description="Image sets in tar shards, for --dataset WEBDATASET.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="pack|index")
    packing = commands.add_parser("pack", help="write the shards of an ImageFolder tree, and their index")
    packing.add_argument("tree", type=as_path, metavar="TREE", help="folder with train/CLASS/* and val/CLASS/*")
    packing.add_argument("folder", type=as_path, metavar="SHARDS", help="folder of the shards")
    packing.add_argument("--images", type=int, default=IMAGES_A_SHARD, help="in a shard (default: %(default)s)")
    indexing = commands.add_parser("index", help="write the index of shards that came from elsewhere")
    indexing.add_argument(
        "patterns", nargs="+", type=as_path_text, metavar="PATTERN",
        help="the shards of a split, such as 'shards/train-{000000..000999}.tar'; splits of one set in one command",
    )  # fmt: skip
    indexing.add_argument(
        "--index-dir", type=as_path, metavar="DIR",
        help="folder of the index (default: beside the shards; where that cannot be written to, the user's cache)",
    )  # fmt: skip
    args = parser.parse_args(arguments)
    try:
        if args.command == "pack" and args.images < 1:
            raise DataError(f"--images {args.images}: must be at least 1")
        with _signals_interrupt():
            if args.command == "pack":
                lines = pack(args.tree, args.folder, args.images)
            else:
                lines = write_indexes([expand(pattern) for pattern in args.patterns], args.index_dir)
    except DataError as error:
        fail("preprocess.py", error)
    except KeyboardInterrupt:
        print_error("preprocess.py", "stopped by a signal, nothing new is left behind")
        return 1
    show("\n".join(lines))
    return 0


@contextlib.contextmanager
def _signals_interrupt() -> Iterator[None]:
    """SIGTERM and SIGHUP end the block like SIGINT, by KeyboardInterrupt, so that what was half made is removed."""
    names = [name for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]  # not all on Windows
    before = {getattr(signal, name): signal.getsignal(getattr(signal, name)) for name in names}
    taken = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}  # nohup
    for number in taken:
        signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in taken.items():
            signal.signal(number, handler)
