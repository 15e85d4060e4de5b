"""Packing an image tree into tar shards: its files byte by byte, in the tree's order, always into the same shards."""

import contextlib
import io
import os
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

from sasa.console import one_line, printable
from sasa.data.class_files import JSON, TEXT, classes_file
from sasa.data.errors import DataError
from sasa.data.images import Files
from sasa.data.shard_index import write_indexes
from sasa.data.trees import read_trees

IMAGES_A_SHARD = 1000  # about 100 MB of ImageNet
_UNFINISHED = ".pack-"  # how the folders begin in which shards are written


def pack(tree: Path, folder: Path, images_a_shard: int = IMAGES_A_SHARD) -> list[str]:
    """Shards of an ImageFolder tree (train/, val/), the names of its classes, and their index.

    Nothing appears in `folder` before all of it is written, and nothing that lies there is replaced.

    Returns:
        A line for each split, for what the tree leaves out, and for what a pack that was killed has left.

    Raises:
        DataError: a tree that cannot be packed, or a folder that holds shards or names of classes.
    """
    classes, train, val, notes = read_trees("FOLDER", tree)
    shown = printable(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _refuse_a_set(folder)
        notes = notes + [_left_behind(path) for path in sorted(folder.glob(f"{_UNFINISHED}*"))]
        with _emptied_afterwards(folder) as made:
            for split, (images, labels) in (("train", train), ("val", val)):
                for number, first in enumerate(range(0, len(labels), images_a_shard)):
                    numbers = range(first, min(first + images_a_shard, len(labels)))
                    _write_shard(made / f"{split}-{number:06d}.tar", images, labels, numbers)
            name, content = classes_file(classes)
            (made / name).write_bytes(content)
            shards = [sorted(map(str, made.glob(f"{split}-*.tar"))) for split in ("train", "val")]
            lines = [line.replace(printable(made), shown, 1) for line in write_indexes(shards, made)]
            _refuse_a_set(folder)  # that came while this one was packed
            for name in sorted(path.name for path in made.iterdir()):
                os.rename(made / name, folder / name)
    except OSError as error:
        where = printable(error.filename) if error.filename else shown
        raise DataError(f"{where}: {one_line(error.strerror or error)}") from error
    return notes + lines


def _refuse_a_set(folder: Path) -> None:
    """Raises DataError where the folder holds shards, an index or names of classes."""
    held = [name for name in os.listdir(folder) if name in (TEXT, JSON) or _is_of_a_set(name)]
    if held:
        raise DataError(
            f"{printable(folder)}: already holds {printable(min(held))}; remove the old set or name another folder"
        )


def _left_behind(path: Path) -> str:
    return f"{printable(path)}: of a pack that was killed, or that is running now; remove it if none is"


def _is_of_a_set(name: str) -> bool:
    return name.startswith(("train-", "val-")) and name.endswith((".tar", "-index.npz"))


@contextlib.contextmanager
def _emptied_afterwards(folder: Path) -> Iterator[Path]:
    """A new folder inside `folder`, of one file system with it, which is gone when the block ends."""
    made = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=folder))
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _write_shard(path: Path, images: Files, labels: list[int], numbers: range) -> None:
    """The images of these numbers: KEY.suffix and KEY.cls each, KEY the number. Raises DataError, OSError."""
    with tarfile.open(path, "w") as tar:
        for number in numbers:
            try:
                with images.open(number) as file:
                    image = file.read()
            except OSError as error:
                raise DataError(f"{printable(images.name(number))}: {one_line(error.strerror or error)}") from error
            suffix = os.path.splitext(images.name(number))[1].lower()
            for name, content in ((f"{number:08d}{suffix}", image), (f"{number:08d}.cls", b"%d" % labels[number])):
                member = tarfile.TarInfo(name)
                member.size, member.mode = len(content), 0o444
                tar.addfile(member, io.BytesIO(content))
