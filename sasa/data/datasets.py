"""The small data sets, read whole from their files.

A small set is its class names and (images (n, C, H, W) uint8, labels (n,) int64) of training and test set. Everything
that is wrong with its files is a DataError.
"""

import gzip
import math
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sasa.console import one_line, printable
from sasa.data.download import download
from sasa.data.errors import DataError

# torchvision is imported where it is used: it takes a second, and DIGITS does not need it.

_DIGITS_FILE = Path(__file__).with_name("digits.csv.gz")
_DIGITS_TRAIN = 1437  # the first of 1,797, 80%
_IDX_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
# The first training labels as they are published: which set the files are of that lack torchvision's checksums.
_FIRST_LABELS = {"MNIST": [5, 0, 4, 1, 9, 2, 1, 3, 1, 4], "FashionMNIST": [9, 0, 0, 3, 0, 2, 7, 2, 5, 5]}
_IDX_BYTES = 2**28  # of one file unpacked; MNIST's largest has 47 million

# ---- small sets -----------------------------------------------------------------------------------------------------

SmallSet = tuple[tuple[str, ...], tuple[Tensor, Tensor], tuple[Tensor, Tensor]]  # classes, train, test


def _read_digits(_data_dir: Path) -> SmallSet:
    """The embedded set; how its pixels are scaled is in data/README.md."""
    try:
        table = torch.from_numpy(np.loadtxt(_DIGITS_FILE, delimiter=",", dtype=np.int64))
        if table.shape != (1797, 65):
            raise ValueError(f"1797 lines of 65 numbers expected, found {tuple(table.shape)}")
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise DataError(f"{_DIGITS_FILE}: {one_line(error)}; take the file from the repository again") from error
    images = ((255 * table[:, :64] + 8) // 16).byte().view(-1, 1, 8, 8)
    labels = table[:, 64]
    train, test = slice(_DIGITS_TRAIN), slice(_DIGITS_TRAIN, None)
    return tuple("0123456789"), (images[train], labels[train]), (images[test], labels[test])


def _read_cifar(name: str) -> Callable[[Path], SmallSet]:
    def read(data_dir: Path) -> SmallSet:
        from torchvision import datasets

        kind = getattr(datasets, name)
        folder = data_dir / kind.base_folder
        files = [*kind.train_list, *kind.test_list, (kind.meta["filename"], kind.meta["md5"])]
        if not all(os.path.isfile(folder / file) for file, _ in files):
            download(kind, data_dir)
        try:
            splits = [kind(str(data_dir), train=part) for part in (True, False)]
        except Exception as error:  # its checksums do not match; without checksums, whatever unpickling makes of it
            wrong = [file for file, md5 in files if not datasets.utils.check_integrity(str(folder / file), md5)]
            what = f"{printable(folder / wrong[0])}: damaged" if wrong else f"{printable(folder)}: {one_line(error)}"
            raise DataError(f"{what}; delete {printable(folder)} and start again to download it") from error
        parts = [(torch.from_numpy(p.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(p.targets)) for p in splits]
        return tuple(splits[0].classes), *parts

    return read


def _read_mnist(name: str) -> Callable[[Path], SmallSet]:
    def read(data_dir: Path) -> SmallSet:
        """Four IDX files, packed or not: torchvision's <name>/raw, or data_dir itself (Debian's fashion-mnist)."""
        from torchvision import datasets

        kind, other = getattr(datasets, name), getattr(datasets, {"MNIST": "FashionMNIST"}.get(name, "MNIST"))
        raw = data_dir / name / "raw"
        paths = _find_idx(raw, data_dir, other)
        if paths is None:
            download(kind, data_dir)
            paths = _find_idx(raw, data_dir, other)
        if paths is None:
            raise DataError(
                f"{printable(raw)}: still not the four files of {name} after the download; delete it and start again"
            )
        parts = []
        for images_path, labels_path in (paths[:2], paths[2:]):
            images, labels = _read_idx(images_path, 3), _read_idx(labels_path, 1).long()
            if len(images) != len(labels) or not len(labels) or int(labels.max()) >= len(kind.classes):
                raise DataError(
                    f"{printable(labels_path)}: not the labels of {images_path.name}; put {name}'s own files there"
                )
            parts.append((images[:, None], labels))
        if parts[0][1][:10].tolist() == _FIRST_LABELS[other.__name__]:
            raise DataError(
                f"{printable(paths[1])}: these are {other.__name__}'s files; put {name}'s own in {printable(raw)}, or "
                f"choose --dataset {other.__name__}"
            )
        return tuple(kind.classes), *parts

    return read


def _find_idx(raw: Path, data_dir: Path, other: type) -> list[Path] | None:
    """The four files, each packed (first, as it carries a checksum) or not; None where they are not there.

    Two sets have files of the same names: where torchvision's checksums say that a folder's are the `other`'s, they are
    not taken.
    """
    for folder in (raw, data_dir):
        found = [[folder / (name + suffix) for suffix in (".gz", "")] for name in _IDX_FILES]
        paths = [next((path for path in both if os.path.isfile(path)), None) for both in found]
        if None not in paths and not any(map(_is_of(other), paths)):
            return paths
    return None


def _is_of(kind: type) -> Callable[[Path], bool]:
    """Whether a file has the checksum that torchvision knows of the file of this name in a set."""
    from torchvision.datasets.utils import check_integrity

    checksums = dict(kind.resources)
    return lambda path: path.name in checksums and check_integrity(str(path), checksums[path.name])


def _read_idx(path: Path, ndim: int) -> Tensor:
    """An IDX file of bytes: two zeros, 8 (uint8), the number of sizes, each size as 4 bytes, the values."""
    head = 4 + 4 * ndim
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            data = file.read(head)
            if data[:4] != bytes((0, 0, 8, ndim)):
                raise ValueError(f"not an IDX file of {ndim}-dimensional bytes")
            shape = struct.unpack_from(f">{ndim}I", data, 4)
            size = math.prod(shape)
            if size > _IDX_BYTES:  # before it is unpacked: a small .gz can hold gigabytes
                raise ValueError(f"shape {shape} is far beyond a set of this kind")
            data += file.read(size + 1)
        if len(data) != head + size:
            count = f"{len(data) - head}" if len(data) <= head + size else f"more than {size}"
            raise ValueError(f"{count} bytes do not hold shape {shape}")
    except (OSError, EOFError, zlib.error, ValueError, struct.error) as error:
        raise DataError(f"{printable(path)}: damaged ({one_line(error)}); delete it and get it again") from error
    return torch.frombuffer(bytearray(data), dtype=torch.uint8, offset=head).view(shape)


SMALL_SETS: dict[str, Callable[[Path], SmallSet]] = {
    "DIGITS": _read_digits,
    "CIFAR10": _read_cifar("CIFAR10"),
    "CIFAR100": _read_cifar("CIFAR100"),
    "MNIST": _read_mnist("MNIST"),
    "FashionMNIST": _read_mnist("FashionMNIST"),
}
