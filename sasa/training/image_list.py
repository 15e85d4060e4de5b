"""Which images a run has: a list beside its checkpoints, which themselves hold counts and hashes of them alone.

A first line has the hash of each split, by which a checkpoint knows its own list; then follows a line an image: its
split, name and label, and the size of its file or a digest of its content. Read where a data set has changed, to name
the images that differ.
"""

import gzip
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from sasa.console import one_line, printable
from sasa.files import open_regular, replacing

SPLITS = ("train", "holdout", "test")
_NAMED = 3  # images of each kind of difference
_NAME_SHOWN = 100  # characters of a name in a message: its end
_LINE = 2**16  # bytes of a line, far beyond any path
_AT_ONCE = 4096  # lines


class Listed(NamedTuple):
    """One image of a split. content: what is compared beside the label, in words: "120 bytes"."""

    split: str
    name: str
    label: int
    content: str


def write(path: Path, identity: dict[str, Any], images: Iterable[Listed]) -> None:
    """The list of the images that `preprocess.data_identity` is of; a whole one of the same images is kept.

    Raises:
        OSError: the disk refuses.
    """
    if _is_of(path, identity):
        return
    lines = (json.dumps(image).encode() + b"\n" for image in images)
    with replacing(path) as raw, gzip.GzipFile("", "wb", 3, raw, mtime=0) as file:
        file.write(json.dumps(_hashes(identity)).encode() + b"\n")
        while chunk := b"".join(islice(lines, _AT_ONCE)):
            file.write(chunk)


def changes(path: Path, saved: dict[str, Any], now: dict[str, Any], images: Iterable[Listed]) -> list[str]:
    """The first images that are not the same in two of `preprocess.data_identity`, in one line; none: no line.

    Args:
        path: the list of the saved ones; where it cannot be used, the line says so.
        images: those of `now`.
    """
    if _hashes(saved) == _hashes(now):
        return []
    try:
        before = {image.name: image for image in _read(path, saved)}
    except (OSError, EOFError, ValueError, TypeError, RecursionError, zlib.error) as error:
        what = getattr(error, "strerror", None) or error
        return [f"which images differ is not known: {printable(path)}: {one_line(what, 100)}"]
    after = {image.name: image for image in images}
    classes, classes_before = now["class_names"], saved["class_names"]
    gone = [_shown(name) for name in before if name not in after]
    new = [_shown(name) for name in after if name not in before]
    changed, relabelled = [], []
    for name, image in after.items():
        other = before.get(name, image)
        if image.content != other.content:
            changed.append(f"{_shown(name)} ({image.content}, was {printable(other.content[:40])})")
        label, old = _class_of(image, classes), _class_of(other, classes_before)
        if name in before and label != old:
            relabelled.append(f"{_shown(name)} ({label}, was {old})")
    kinds = (("gone", gone), ("new", new), ("changed", changed), ("in another class", relabelled))
    parts = [f"{kind}: {_first(names)}" for kind, names in kinds if names]
    return ["; ".join(parts) if parts else "the same images, but in another order or split"]


def _hashes(identity: dict[str, Any]) -> dict[str, str | None]:
    return {split: (identity[split] or {}).get("hash") for split in SPLITS}


def _is_of(path: Path, identity: dict[str, Any]) -> bool:
    """Whether a whole list of these images is there."""
    try:
        return sum(1 for _ in _read(path, identity)) > 0
    except (OSError, EOFError, ValueError, TypeError, RecursionError, zlib.error):
        return False


def _read(path: Path, identity: dict[str, Any]) -> Iterator[Listed]:
    """Raises ValueError, or another error of the readers: the list is damaged, or of other images."""
    wanted = sum((identity[split] or {}).get("images", 0) for split in SPLITS)
    with os.fdopen(open_regular(path, os.O_RDONLY), "rb") as raw, gzip.GzipFile(fileobj=raw) as file:
        if json.loads(file.readline(_LINE)) != _hashes(identity):
            raise ValueError("of other images than the checkpoint's")
        for _ in range(wanted):
            split, name, label, content = json.loads(file.readline(_LINE))
            if not (isinstance(name, str) and isinstance(label, int) and isinstance(content, str)):
                raise ValueError("damaged")
            yield Listed(split, name, label, content)
        if file.read(1):
            raise ValueError("longer than the checkpoint's")


def _class_of(image: Listed, names: list[str]) -> str:
    return printable(names[image.label]) if 0 <= image.label < len(names) else f"class {image.label}"


def _shown(name: str) -> str:
    return printable(name if len(name) <= _NAME_SHOWN else "..." + name[-_NAME_SHOWN:])


def _first(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
