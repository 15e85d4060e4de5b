"""Reading data sets from the disk, and fetching them: what lies under `preprocess.load`.

A small set is read whole, as its class names and (images (n, C, H, W) uint8, labels (n,) int64) of training and test
set; of an image tree only the paths and labels are listed. Everything that is wrong with the files is a DataError.
"""

import gzip
import http.client
import os
import queue
import signal
import socket
import struct
import tarfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from sasa.data.augment import crop_box

# torchvision is imported where it is used: it takes a second, and DIGITS does not need it.

NETWORK_WAIT_S = 10.0
_DIGITS_FILE = Path(__file__).with_name("digits.csv.gz")
_DIGITS_TRAIN = 1437  # the first of 1,797, 80%
_IDX_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
_DEBIAN_FASHION = "/usr/share/datasets/fashion-mnist"


class DataError(Exception):
    """Wrong data: one line that names the path and what to do."""


def one_line(error: object) -> str:
    """What an error says, short and without line breaks."""
    return " ".join(str(error).split())[:200] or type(error).__name__


# ---- small sets ------------------------------------------------------------------------------------------------------

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
        if not all((folder / file).is_file() for file, _ in files):
            download(kind, data_dir)
        try:
            splits = [kind(str(data_dir), train=part) for part in (True, False)]
        except Exception as error:  # its checksums do not match; without checksums, whatever unpickling makes of it
            wrong = [file for file, md5 in files if not datasets.utils.check_integrity(str(folder / file), md5)]
            what = f"{folder / wrong[0]}: damaged" if wrong else f"{folder}: {one_line(error)}"
            raise DataError(f"{what}; delete {folder} and start again to download it") from error
        parts = [(torch.from_numpy(p.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(p.targets)) for p in splits]
        return tuple(splits[0].classes), *parts

    return read


def _read_mnist(name: str) -> Callable[[Path], SmallSet]:
    def read(data_dir: Path) -> SmallSet:
        """Four IDX files: .gz in data_dir itself (Debian's dataset-fashion-mnist), or torchvision's <name>/raw."""
        from torchvision import datasets

        kind = getattr(datasets, name)
        raw = data_dir / name / "raw"

        def find() -> list[Path] | None:
            for folder in (data_dir, raw):
                for suffix in (".gz", ""):  # .gz first: it carries a checksum
                    paths = [folder / (file + suffix) for file in _IDX_FILES]
                    if all(path.is_file() for path in paths):
                        return paths
            return None

        paths = find()
        if paths is None:
            download(kind, data_dir)
            paths = find()
        if paths is None:
            raise DataError(f"{raw}: still not the four files of {name} after the download; delete it and start again")
        parts = []
        for images_path, labels_path in (paths[:2], paths[2:]):
            images, labels = _read_idx(images_path, 3), _read_idx(labels_path, 1).long()
            if len(images) != len(labels) or not len(labels) or int(labels.max()) >= len(kind.classes):
                raise DataError(f"{labels_path}: not the labels of {images_path.name}; put {name}'s own files there")
            parts.append((images[:, None], labels))
        return tuple(kind.classes), *parts

    return read


def _read_idx(path: Path, ndim: int) -> Tensor:
    """An IDX file of bytes: two zeros, 8 (uint8), the number of sizes, each size as 4 bytes, the values."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            data = file.read()
        if data[:4] != bytes((0, 0, 8, ndim)):
            raise ValueError(f"not an IDX file of {ndim}-dimensional bytes")
        shape = struct.unpack_from(f">{ndim}I", data, 4)
        if len(data) != 4 + 4 * ndim + int(np.prod(shape)):
            raise ValueError(f"{len(data)} bytes do not hold shape {shape}")
    except (OSError, EOFError, zlib.error, ValueError, struct.error) as error:
        raise DataError(f"{path}: damaged ({one_line(error)}); delete it and get it again") from error
    return torch.frombuffer(bytearray(data), dtype=torch.uint8, offset=4 + 4 * ndim).view(shape)


SMALL_SETS: dict[str, Callable[[Path], SmallSet]] = {
    "DIGITS": _read_digits,
    "CIFAR10": _read_cifar("CIFAR10"),
    "CIFAR100": _read_cifar("CIFAR100"),
    "MNIST": _read_mnist("MNIST"),
    "FashionMNIST": _read_mnist("FashionMNIST"),
}


# ---- image trees -----------------------------------------------------------------------------------------------------


def read_trees(name: str, data_dir: Path) -> tuple[list[str], tuple, tuple]:
    """Classes, and (`Files`, labels) of data_dir/train and data_dir/val, a folder a class."""
    if not data_dir.is_dir():
        raise DataError(f"{data_dir}: no such folder; --data-dir must hold train/ and val/, each with a folder a class")
    classes, train = _read_tree(data_dir / "train")
    val_classes, val = _read_tree(data_dir / "val")
    if classes != val_classes:
        odd = sorted(set(classes) ^ set(val_classes))
        raise DataError(f"{data_dir}: train/ and val/ have different class folders, {odd[0]} is in one of them only")
    if name == "IMAGENET" and len(classes) != 1000:
        raise DataError(f"{data_dir}: IMAGENET has 1000 class folders, here are {len(classes)}; try --dataset FOLDER")
    return classes, train, val


def _read_tree(root: Path) -> tuple[list[str], tuple["Files", list[int]]]:
    from torchvision.datasets import ImageFolder

    try:
        tree = ImageFolder(str(root), allow_empty=True)
    except OSError as error:
        what = "no class folders in it" if root.is_dir() else "no such folder"
        raise DataError(f"{root}: {what}; put one folder of images for each class there") from error
    empty = sorted(set(range(len(tree.classes))) - set(tree.targets))
    if empty:
        raise DataError(f"{root / tree.classes[empty[0]]}: class folder without images; fill it or remove it")
    return tree.classes, (Files([path for path, _ in tree.samples]), tree.targets)


class Key(NamedTuple):
    """All that a worker needs to know to make one sample."""

    index: int
    crop: np.ndarray | None  # numbers of `augment.crop_box`; None is evaluation


class Files:
    """The image files of a tree, by number."""

    def __init__(self, paths: list[str]) -> None:
        # An array, not a list: the workers' copies of a million Python objects would grow with every reference count.
        self.paths = np.array([os.fsencode(path) for path in paths])

    def __len__(self) -> int:
        return len(self.paths)

    def take(self, index: list[int]) -> "Files":
        return Files([self.name(i) for i in index])

    def name(self, index: int) -> str:
        return os.fsdecode(self.paths[index])

    def open(self, index: int) -> str:
        """What PIL opens."""
        return self.name(index)


class ImageFiles(Dataset):
    """Files and labels; one sample is a function of its key, whichever worker makes it.

    files: `Files`, or `shards.ShardFiles`.
    """

    def __init__(self, files, labels: list[int], size: int, skip_bad_images: bool) -> None:
        from torchvision.transforms import v2

        self.files = files
        self.labels = np.array(labels, dtype=np.int64)
        self.skip_bad_images = skip_bad_images
        self._size = [size, size]
        self._test = v2.Compose([v2.Resize(round(size * 256 / 224), antialias=True), v2.CenterCrop(size)])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: Key) -> tuple[Tensor | None, int, list[str]]:
        """Image (3, size, size) uint8, label, and what could not be read: "path: what is wrong".

        A training image that cannot be read is replaced by the next in the list that can, with that one's label, so
        that batches keep their size and do not depend on the workers. Without skip_bad_images, in evaluation, and
        where no file at all can be read, the image is None.
        """
        bad: list[str] = []
        for index in range(key.index, key.index + len(self)):
            index %= len(self)
            try:
                return self._transform(self._read(index), key), int(self.labels[index]), bad
            except _BadImageError as error:
                bad.append(f"{self.files.name(index)}: {error}")
            if key.crop is None or not self.skip_bad_images:
                break
        return None, -1, bad

    def _read(self, index: int):
        """The decoded image, by PIL: torchvision's decoder fills a truncated JPEG with gray silently."""
        from PIL import Image

        try:
            with Image.open(self.files.open(index)) as image:
                image.load()
                return image if image.mode == "RGB" else image.convert("RGB")  # which copies what is RGB already
        except Exception as error:  # broken files make the decoders raise anything, from OSError to struct.error
            raise _BadImageError(one_line(error)) from error

    def _transform(self, image, key: Key) -> Tensor:
        """PIL image -> (3, size, size) uint8."""
        from torchvision.transforms.v2 import functional

        if key.crop is None:
            return self._test(functional.pil_to_tensor(image))
        top, left, height, width = crop_box(key.crop, image.height, image.width)
        # Cropped before it becomes a tensor: half of the pixels, on average, need not be copied.
        crop = functional.pil_to_tensor(image.crop((left, top, left + width, top + height)))
        return functional.resize(crop, self._size, antialias=True)


class _BadImageError(Exception):
    pass


def collate(samples: list[tuple[Tensor | None, int, list[str]]]) -> tuple[Tensor, Tensor, list[str]]:
    """Images (B, 3, size, size) uint8 of those samples that have one, labels (B,) int64, what could not be read."""
    good = [(image, label) for image, label, _ in samples if image is not None]
    # By pixels with their channels, as resizing leaves them: a plain copy, in a worker into memory that it shares.
    rows = [image.permute(1, 2, 0) for image, _ in good]
    images = default_collate(rows) if rows else torch.empty(0, 0, 0, 3, dtype=torch.uint8)
    labels = torch.tensor([label for _, label in good])
    return images.permute(0, 3, 1, 2), labels, [line for *_, bad in samples for line in bad]


def ignore_signals(_worker: int) -> None:
    """Launchers signal the whole process group; the training process decides when its workers end."""
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):  # no SIGUSR1 on Windows
            signal.signal(getattr(signal, name), signal.SIG_IGN)


# ---- the network ----------------------------------------------------------------------------------------------------


def download(kind: type, data_dir: str | Path, otherwise: str | None = None) -> None:
    """Lets torchvision fetch and check a set. Without a network this ends within NETWORK_WAIT_S.

    Raises: DataError where none of the mirrors answers, or what came is not what was asked for. It ends with
    `otherwise`, or with what to do.
    """
    where = f"{kind.__name__} is not in {data_dir}"
    if otherwise is None:
        otherwise = "put its files there, or choose --dataset DIGITS, which needs none"
        if kind.__name__ == "FashionMNIST":
            otherwise = f"put its files there, or install Debian's dataset-fashion-mnist, --data-dir {_DEBIAN_FASHION}"
    mirrored = hasattr(kind, "mirrors")
    urls = [mirror + kind.resources[0][0] for mirror in kind.mirrors] if mirrored else [kind.url]
    if (problem := _unreachable(urls)) is not None:
        raise DataError(f"{where} and cannot be downloaded ({problem}): {otherwise}")
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(NETWORK_WAIT_S)  # torchvision sets none, and a line that falls silent would hang the run
    try:
        kind(str(data_dir), download=True)
    except (RuntimeError, OSError, EOFError, http.client.HTTPException, tarfile.TarError, zlib.error) as error:
        raise DataError(f"{where} and the download failed ({one_line(error)}): {otherwise}") from error
    finally:
        socket.setdefaulttimeout(before)


def _unreachable(urls: list[str]) -> str | None:
    """None where one of the addresses answers within NETWORK_WAIT_S, else why not.

    In threads, because no timeout bounds the look-up of a name.
    """
    answers: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def ask(url: str) -> None:
        try:
            request = urllib.request.Request(url, method="HEAD", headers={"User-Agent": "pytorch/vision"})
            urllib.request.urlopen(request, timeout=NETWORK_WAIT_S).close()
            answers.put(None)
        except urllib.error.HTTPError:
            answers.put(None)  # someone is there: the download itself will say what is wrong
        except Exception as error:
            answers.put(f"{urllib.parse.urlparse(url).hostname}: {one_line(getattr(error, 'reason', error))}")

    for url in urls:
        threading.Thread(target=ask, args=(url,), daemon=True).start()
    end, problem = time.monotonic() + NETWORK_WAIT_S, f"no answer within {NETWORK_WAIT_S:g} s"
    for _ in urls:
        try:
            problem = answers.get(timeout=max(end - time.monotonic(), 0))
        except queue.Empty:
            break
        if problem is None:
            return None
    return problem
