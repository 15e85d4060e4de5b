"""What a data set is made of, in a few numbers: a checkpoint can tell by them whether it has the same one before it.

A split's fingerprint holds the number of its images and a hash of all of them in their order: of each file's relative
path, size and label, or of a tensor set's bytes and labels. Up to `CLASSES_APART` classes each class has a number and
a hash of its own, which locates a difference. Plain values only, for checkpoints and JSON.
"""

import hashlib
import zlib
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from sasa.console import printable, show_apart

CLASSES_APART = 1000
_NAMED = 3  # differences of one kind that are named one by one


def fingerprint(identities: Iterable[bytes], labels: Iterable[int], num_classes: int) -> dict[str, Any]:
    """The fingerprint of images by what identifies each, and their labels, in order.

    Returns:
        {"images": count, "hash": hex, "classes": [[count, hex] of each class], or [] beyond CLASSES_APART}.
    """
    whole, count = _hash(), 0
    apart = [[0, _hash()] for _ in range(num_classes)] if num_classes <= CLASSES_APART else []
    for identity, label in zip(identities, labels, strict=True):
        record = b"%d %d " % (label, len(identity)) + identity
        whole.update(record)
        count += 1
        if apart:
            apart[label][0] += 1
            apart[label][1].update(record)
    return {
        "images": count,
        "hash": whole.hexdigest(),
        "classes": [[images, digest.hexdigest()[:16]] for images, digest in apart],
    }


def of_files(names: list[bytes], sizes: list[int], labels: list[int], num_classes: int) -> dict[str, Any]:
    """The fingerprint of image files by their names and sizes in bytes.

    Returns:
        `fingerprint`'s, and "names": a hash without the sizes, which stays the same where files were damaged.
    """
    whole = (name + b"\0%d" % size for name, size in zip(names, sizes, strict=True))
    return fingerprint(whole, labels, num_classes) | {"names": fingerprint(names, labels, 0)["hash"]}


def of_tensors(images: Tensor, labels: Tensor, num_classes: int) -> dict[str, Any]:
    """The fingerprint of images (n, C, H, W) uint8, by their bytes, and labels (n,) int64."""
    rows = images.cpu().contiguous().flatten(1).numpy()
    return fingerprint(map(bytes, rows), labels.tolist(), num_classes)


def list_tensors(images: Tensor, labels: Tensor, names: Iterable[str]) -> list[tuple[str, int, str]]:
    """What `Split.listed` has of the same images: name, label, and a checksum of the pixels."""
    rows = images.cpu().contiguous().flatten(1).numpy()
    contents = (f"pixels of checksum {checksum(row)}" for row in rows)
    return list(zip(names, labels.tolist(), contents, strict=True))


def checksum(content: bytes) -> str:
    """8 hex digits that show a person whether the content is the same."""
    return f"{zlib.crc32(content):08x}"


def _hash():
    return hashlib.blake2b(digest_size=16)


def differences(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What is not the same in two of `preprocess.data_identity`, a line each, the first few of every kind by name."""
    lines = []
    if saved["dataset"] != now["dataset"]:
        lines.append(f"the data set is {now['dataset']}, was {saved['dataset']}")
    lines += class_differences(saved["class_names"], now["class_names"])
    for key in ("mean", "std"):
        if list(saved[key]) != list(now[key]):
            lines.append(f"the normalisation's {key} is {_numbers(now[key])}, was {_numbers(saved[key])}")
    names = now["class_names"] if saved["class_names"] == now["class_names"] else []
    for split in ("train", "holdout", "test"):
        lines += _split_differences(split, saved[split], now[split], names)
    return lines


def only_sizes_differ(saved: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether two of `preprocess.data_identity` have the same files, some of another size, as damage leaves them."""
    splits = ("train", "holdout", "test")
    if any(saved[key] != now[key] for key in now if key not in splits):
        return False
    names = [[(split or {}).get("names", split) for split in (saved[key], now[key])] for key in splits]
    return all(before == after for before, after in names)


def class_differences(saved: list[str], now: list[str]) -> list[str]:
    """How two lists of class names differ, in one line; nothing where they are equal."""
    if list(saved) == list(now):
        return []
    parts = [f"{len(now)} classes, were {len(saved)}"] if len(saved) != len(now) else []
    unequal = [i for i, (a, b) in enumerate(zip(saved, now, strict=False)) if a != b]
    for i in unequal[:_NAMED]:
        new, old = show_apart(now[i], [saved[i]]), show_apart(saved[i], [now[i]])
        parts.append(f"class {i} is {new}, was {old}")
    if len(unequal) > _NAMED:
        parts.append(f"{len(unequal) - _NAMED} more are renamed or moved")
    return [", ".join(parts)]


def class_order(saved: list[str], now: list[str]) -> list[int] | None:
    """For each class of `now` its number in `saved`; None where the two do not hold the same names."""
    number = {name: i for i, name in enumerate(saved)}
    if len(number) != len(saved) or len(now) != len(saved) or set(now) != set(saved):
        return None
    return [number[name] for name in now]


def _split_differences(split: str, saved: dict | None, now: dict | None, names: list[str]) -> list[str]:
    """`names`: of the classes, where both sides have the same ones."""
    if saved is None or now is None:
        return [] if saved == now else [f"{split}: {_count(now)}, were {_count(saved)}"]
    if (saved["images"], saved["hash"]) == (now["images"], now["hash"]):
        return []
    parts, classes = [], list(zip(saved["classes"], now["classes"], strict=False)) if names else []
    unequal = [(names[i], *pair) for i, pair in enumerate(classes) if list(pair[0]) != list(pair[1])]
    for name, (before, _), (images, _) in unequal[:_NAMED]:
        what = f"{images} images, were {before}" if images != before else f"{images} images, not the same ones"
        parts.append(f"class {printable(name)} {what}")
    if len(unequal) > _NAMED:
        parts.append(f"and {len(unequal) - _NAMED} more classes")
    total = f"{now['images']} images, were {saved['images']}"
    if now["images"] == saved["images"]:
        total = f"{now['images']} images, not the same ones"
    return [f"{split}: {total}" + (f" ({'; '.join(parts)})" if parts else "")]


def _count(split: dict | None) -> str:
    return "no images" if split is None else f"{split['images']} images"


def _numbers(values: list[float]) -> str:
    return "(" + ", ".join(f"{value:g}" for value in values) + ")"
