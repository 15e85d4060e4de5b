"""One image of a tree or of shards: decoded, cropped and resized, as workers do it."""

import contextlib
import errno
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from sasa.console import one_line, printable
from sasa.data.augment import AugmentConfig, crop_box
from sasa.data.decode import decode, largest_of_16_bits
from sasa.data.errors import WorkerError
from sasa.data.specs import TREE_EVAL_CROP

_STATS_AT_ONCE, _STAT_THREADS = 4096, 16
_SHORTAGES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # of open files and of memory
_LOOKED_AT, _FAINT = 8, 2**13  # images, and the largest pixel of 16 bits that is an eighth of the range
_LONGEST = 16  # short sides of a picture that evaluation resizes: of a longer one its middle


class Source(Protocol):
    """Image files by number, wherever they lie: `Files` or `shards.ShardFiles`."""

    def __len__(self) -> int: ...

    def take(self, index: list[int]) -> "Source":
        """The files of these numbers, renumbered."""

    def name(self, index: int) -> str:
        """For a person: the path, or the place in a shard."""

    def open(self, index: int) -> BinaryIO:
        """The file, to read. Raises OSError."""

    def identities(self) -> list[bytes]:
        """Where each file lies: its path in the tree, or its shard and first byte."""

    def sizes(self) -> list[int]:
        """Of each file in bytes; -1 where that cannot be found out."""


class Files:
    """Image files by their paths; a `Source`."""

    def __init__(self, paths: list[str], root: str = "") -> None:
        """`root`: the tree's folder, which the images' identities leave out."""
        # An array, not a list: the workers' copies of a million Python objects would grow with every reference count.
        self.paths, self.root = np.array([os.fsencode(path) for path in paths]), root

    def __len__(self) -> int:
        return len(self.paths)

    def take(self, index: list[int]) -> "Files":
        return Files([self.name(i) for i in index], self.root)

    def name(self, index: int) -> str:
        return os.fsdecode(self.paths[index])

    def open(self, index: int) -> BinaryIO:
        """The file, to read. Raises OSError: for a pipe or a device too, which might never answer."""
        descriptor = os.open(self.paths[index].item(), os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise OSError("not a regular file")
        return os.fdopen(descriptor, "rb")

    def identities(self) -> list[bytes]:
        """The path of each file in the tree."""
        root = os.path.join(os.fsencode(self.root), b"") if self.root else b""
        return [path.removeprefix(root) for path in self.paths.tolist()]

    def sizes(self) -> list[int]:
        """Of each file in bytes; -1 where that cannot be found out."""
        parts = np.array_split(self.paths, -(-len(self) // _STATS_AT_ONCE) or 1)
        with ThreadPoolExecutor(_STAT_THREADS) as pool:  # on a network's file system each waits for the server
            return [size for part in pool.map(_sizes, parts) for size in part]


def _sizes(paths: np.ndarray) -> list[int]:
    return list(map(_size, paths.tolist()))


def _size(path: bytes) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return -1  # reading it will say what is wrong


def note_on_range(files: Source) -> str:
    """A line where 16-bit gray pictures hold 12 bits or so, as cameras write them, and would be read as nearly black.

    It looks at a few files, evenly spread. The line is empty where all is well or nothing can be read.
    """
    looked = min(len(files), _LOOKED_AT)
    found = []
    for i in range(looked):
        # A decoder may raise any error here. It is reported later, when the file is read for training.
        with contextlib.suppress(Exception), files.open(i * len(files) // looked) as file:
            found.append(largest_of_16_bits(file))
    found = [largest for largest in found if largest is not None]
    if not found or max(found) >= _FAINT:
        return ""
    return (
        f"{len(found)} of {looked} images looked at are 16-bit gray with no pixel above {max(found)} of 65535: nearly "
        "black by the high byte, which is read; scale them to the full range, or save 8 bits"
    )


class _BadImageError(Exception):
    """An image that cannot be read."""


class Key(NamedTuple):
    """All that a worker needs to know to make one sample."""

    index: int
    crop: np.ndarray | None  # numbers of `augment.crop_box`; None is evaluation
    area: float = AugmentConfig.crop_area
    aspect: float = AugmentConfig.crop_aspect


class Evaluated(NamedTuple):
    """How an image is fed in evaluation: a centre crop of `size` out of an image of `resize` pixels on its short side.

    interpolation: bilinear or bicubic, antialiased.
    """

    size: int
    resize: int
    interpolation: str = "bilinear"


def resize_tensor(images: Tensor, fed: Evaluated) -> Tensor:
    """(n, C, H, W) uint8, H = W -> (n, C, size, size) uint8, as `fed`. Once, at loading."""
    side, border = fed.resize, round((fed.resize - fed.size) / 2)
    if images.shape[-2:] != (side, side):
        options = {"size": (side, side), "mode": fed.interpolation, "antialias": True}
        parts = (F.interpolate(part.float(), **options) for part in images.split(4096))
        images = torch.cat([part.round().clamp(0, 255).byte() for part in parts])
    return images[..., border : border + fed.size, border : border + fed.size]


class ImageFiles(Dataset):
    """Files and labels; one sample is a function of its key, whichever worker makes it."""

    def __init__(
        self,
        files: Source,
        labels: list[int],
        size: int,
        skip_bad_images: bool,
        evaluated: Evaluated | None = None,
    ) -> None:
        """`size`: the side of a training image, pixels; `evaluated`: None is that side, cropped as trees are."""
        self.files = files
        self.labels = np.array(labels, dtype=np.int64)
        self.skip_bad_images = skip_bad_images
        self._size = [size, size]
        self._evaluated = evaluated or Evaluated(size, round(size / TREE_EVAL_CROP))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: Key) -> tuple[Tensor | None, int, list[str]]:
        """Image (3, H, W) uint8, label, and what could not be read: "path: what is wrong".

        A training image that cannot be read is replaced by the next in the list that can, with that one's label, so
        that batches keep their size and do not depend on the workers. Without skip_bad_images, in evaluation, and
        where no file at all can be read, the image is None.

        Raises:
            WorkerError: this process has no memory, or may open no more files, which says nothing about the image.
        """
        bad: list[str] = []
        for index in range(key.index, key.index + len(self)):
            index %= len(self)
            try:
                return self._transform(self._read(index), key), int(self.labels[index]), bad
            except _BadImageError as error:
                bad.append(f"{printable(self.files.name(index))}: {error}")
            if key.crop is None or not self.skip_bad_images:
                break
        return None, -1, bad

    def _read(self, index: int) -> Image.Image:
        """The decoded image."""
        try:
            with self.files.open(index) as file:
                return decode(file)
        except OSError as error:
            if error.errno in _SHORTAGES:
                raise WorkerError(f"{printable(self.files.name(index))}: {error.strerror}") from error
            raise _BadImageError(one_line(error.strerror or error, 200)) from error
        except MemoryError as error:
            raise WorkerError(f"{printable(self.files.name(index))}: out of memory") from error
        except Exception as error:  # broken files make the decoders raise anything
            raise _BadImageError(one_line(error, 200)) from error

    def _transform(self, image: Image.Image, key: Key) -> Tensor:
        """RGB -> (3, H, W) uint8."""
        from torchvision.transforms.v2 import InterpolationMode, functional

        if key.crop is None:
            fed = self._evaluated
            mode = InterpolationMode(fed.interpolation)
            pixels = functional.pil_to_tensor(_centre(image))
            pixels = functional.resize(pixels, [fed.resize], mode, antialias=True)
            return functional.center_crop(pixels, [fed.size, fed.size])
        top, left, height, width = crop_box(key.crop, image.height, image.width, key.area, key.aspect)
        # Cropped before it becomes a tensor: half of the pixels, on average, need not be copied.
        crop = functional.pil_to_tensor(image.crop((left, top, left + width, top + height)))
        return functional.resize(crop, self._size, antialias=True)


def _centre(image: Image.Image) -> Image.Image:
    """Of a strip, the middle of at most `_LONGEST` short sides: a picture of 1 x 8000 pixels, its short side resized to
    256, would take gigabytes, of which the centre crop keeps a square."""
    longest = _LONGEST * min(image.size)
    left, top = (max((side - longest) // 2, 0) for side in image.size)
    return image.crop((left, top, image.width - left, image.height - top)) if left or top else image


def collate(samples: list[tuple[Tensor | None, int, list[str]]]) -> tuple[Tensor, Tensor, list[str]]:
    """Images (B, 3, H, W) uint8 of those samples that have one, labels (B,) int64, what could not be read."""
    good = [(image, label) for image, label, _ in samples if image is not None]
    # By pixels with their channels, as resizing leaves them: a plain copy, in a worker into memory that it shares.
    pixels = [image.permute(1, 2, 0) for image, _ in good]  # (H, W, 3) each
    images = default_collate(pixels) if pixels else torch.empty(0, 0, 0, 3, dtype=torch.uint8)
    labels = torch.tensor([label for _, label in good])
    return images.permute(0, 3, 1, 2), labels, [line for *_, bad in samples for line in bad]
