"""Batches of a detection set: plan (which images, which random numbers) -> fetch (workers) -> on the device.

Order, scale, crop and flip are functions of (seed, epoch, step), drawn for the whole global batch and then cut, so that
any step can be entered directly and any number of processes trains on the same images. A training image is resized so
that its longer side is `size` times a random scale, and cropped or padded to size x size; evaluation feeds images as
they are, which the detector itself resizes.
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from sasa.console import one_line, printable
from sasa.data.augment import stream
from sasa.data.batches import epoch_order, own_part, own_pieces, steps_per_epoch
from sasa.data.decode import decode
from sasa.data.errors import DataError
from sasa.data.workers import Workers
from sasa.detection.coco import CocoSplit
from sasa.files import read_regular

Target = dict[str, Tensor]  # boxes (n, 4) float32: x1, y1, x2, y2 in pixels; labels (n,) int64


@dataclass(frozen=True)
class Jitter:
    """lowest, highest: bounds of the random scale, drawn evenly; flip: mirrored left to right, half of the time."""

    lowest: float = 1.0
    highest: float = 1.0
    flip: bool = False


class Key(NamedTuple):
    """All that a worker needs to know to make one sample; `draws` is None in evaluation."""

    index: int
    draws: np.ndarray | None  # (4,) in [0, 1): scale, row, column, flip


def plan(
    size: int, epoch: int, start_step: int, *, global_batch: int, accumulate: int, rank: int, world_size: int, seed: int
) -> Iterator[list[Key]]:
    """This process's keys of an epoch over `size` images from start_step on: `accumulate` lists a step.

    Raises:
        DataError: a step has fewer images than accumulate * world_size.
    """
    total = min(global_batch, size)
    if total < accumulate * world_size:
        raise DataError(f"{total} images a step are too few for {accumulate * world_size} batches at a time")
    parts = own_pieces(total, accumulate, rank, world_size)

    def steps() -> Iterator[list[Key]]:
        order = epoch_order(size, seed, epoch).tolist()
        for step in range(start_step, steps_per_epoch(size, total)):
            draws = stream(seed, "augment", epoch, step).random((total, 4))
            for part in parts:
                yield [Key(order[step * total + i], draws[i]) for i in part]

    return steps()


class CocoImages(Dataset):
    """The images of a split, each a function of its key, whichever worker makes it."""

    def __init__(self, split: CocoSplit, size: int, fill: tuple[int, int, int], jitter: Jitter) -> None:
        """`fill`: the colour of padding, which the detector's own padding has: the mean."""
        self.split, self.size, self.fill, self.jitter = split, size, fill, jitter

    def __len__(self) -> int:
        return len(self.split)

    def name(self, index: int) -> str:
        """The file of an image."""
        return str(self.split.folder / self.split.files[index])

    def __getitem__(self, key: Key) -> tuple[Tensor, Target]:
        """Image (3, H, W) uint8, size x size in training, and its boxes and labels.

        Raises:
            DataError: an image that cannot be read, or whose size is not that of the annotations.
        """
        image = self._read(key.index)
        boxes, labels = self.split.targets(key.index)
        if key.draws is not None:
            image, boxes, kept = place(image, boxes, self.size, self.fill, self.jitter, key.draws)
            labels = labels[kept]
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()  # (H, W, 3) -> (3, H, W)
        return pixels, {"boxes": torch.from_numpy(np.array(boxes)), "labels": torch.from_numpy(np.array(labels))}

    def _read(self, index: int) -> Image.Image:
        path, size = self.name(index), tuple(self.split.sizes[index].tolist())
        try:  # not turned upright: boxes are of the picture as it is stored
            image = decode(io.BytesIO(read_regular(Path(path))), upright=False)
        except Exception as error:  # broken files make the decoders raise anything
            what = getattr(error, "strerror", None) or error
            raise DataError(f"cannot read image {printable(path)}: {one_line(what, 200)}") from error
        if (image.height, image.width) != size:
            is_, should = f"{image.width}x{image.height}", f"{size[1]}x{size[0]}"
            raise DataError(f"{printable(path)}: {is_} pixels, {should} in the annotations: its boxes would be wrong")
        return image


def place(
    image: Image.Image, boxes: np.ndarray, size: int, fill: tuple[int, int, int], jitter: Jitter, draws: np.ndarray
) -> tuple[Image.Image, np.ndarray, np.ndarray]:
    """Scale, crop or pad, and flip, by the numbers drawn.

    Args:
        boxes: (n, 4) float32, x1, y1, x2, y2 in the image's pixels.
        size: side of the result, pixels.
        draws: (4,) in [0, 1): scale, row and column of the crop, flip.

    Returns:
        The image, size x size; the boxes of which at least a pixel each way is left, cut to the image; their numbers.
    """
    scale, row, column, flip = draws.tolist()
    longer = size * (jitter.lowest + (jitter.highest - jitter.lowest) * scale)
    factor = longer / max(image.size)
    width, height = (max(round(side * factor), 1) for side in image.size)
    left, top = int(column * (max(width - size, 0) + 1)), int(row * (max(height - size, 0) + 1))
    boxes = boxes * np.array([width / image.width, height / image.height] * 2, np.float32)
    boxes = boxes - np.array([left, top] * 2, np.float32)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    if (width, height) != (size, size):
        canvas = Image.new("RGB", (size, size), fill)
        canvas.paste(image, (-left, -top))
        image = canvas
    if jitter.flip and flip < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        boxes = np.stack((size - boxes[:, 2], boxes[:, 1], size - boxes[:, 0], boxes[:, 3]), axis=1)
    boxes = np.clip(boxes, 0, size).astype(np.float32)
    kept = np.flatnonzero((boxes[:, 2] - boxes[:, 0] >= 1) & (boxes[:, 3] - boxes[:, 1] >= 1))
    return image, boxes[kept], kept


def to_device(images: list[Tensor], targets: list[Target], device: torch.device) -> tuple[list[Tensor], list[Target]]:
    """uint8 images become float32 in [0, 1]."""
    pixels = [image.to(device, non_blocking=True).float() / 255 for image in images]
    return pixels, [{name: v.to(device, non_blocking=True) for name, v in target.items()} for target in targets]


class DetectionSplit:
    """The images of one purpose and their batches, read by `num_workers` processes or, with 0, by this one.

    One pass at a time: starting another ends the first.
    """

    def __init__(self, images: CocoImages, device: torch.device, *workers) -> None:
        """`workers`: num_workers, timeout_s and is_stopped of `sasa.data.workers.Workers`."""
        self.truth = images.split
        self.bad_images: list[str] = []  # none is ever skipped
        self._workers = Workers(_Samples(images), list, images.name, device, *workers)
        self._device = device

    def __len__(self) -> int:
        return len(self.truth)

    def steps_per_epoch(self, global_batch: int) -> int:
        return steps_per_epoch(len(self), global_batch)

    def batches(self, epoch: int, start_step: int = 0, **options) -> Iterator[tuple[list[Tensor], list[Target]]]:
        """One epoch of this process from optimizer step start_step on: `accumulate` pairs a step.

        Args:
            options: those of `plan`.

        Yields:
            images (3, size, size) float32 in [0, 1] and their targets, on the device.

        Raises:
            DataError: an image that cannot be read, or a step with fewer images than pieces.
            WorkerError: a decoding process died, or handed nothing over.
        """
        return self._read(plan(len(self), epoch, start_step, **options))

    def eval_batches(
        self, batch_size: int, rank: int = 0, world_size: int = 1
    ) -> Iterator[tuple[list[int], list[Tensor], list[Target]]]:
        """Each image once over all ranks, in order, as it is: numbers, images (3, H, W) float32 in [0, 1], targets."""
        numbers = list(own_part(len(self), batch_size, rank, world_size))
        read = self._read([Key(i, None) for i in part] for part in numbers)
        for part, (images, targets) in zip(numbers, read, strict=True):
            yield list(part), images, targets

    def _read(self, keys: Iterator[list[Key]]) -> Iterator[tuple[list[Tensor], list[Target]]]:
        for samples in self._workers.batches(keys):
            for sample in samples:
                if isinstance(sample, str):
                    raise DataError(sample)
            images, targets = zip(*samples, strict=True)
            yield to_device(images, targets, self._device)

    def close(self) -> None:
        """Ends the workers, where there are any."""
        self._workers.close()


class _Samples(Dataset):
    """The images, with the line of what is wrong in the place of one that cannot be read: an exception that crosses
    processes comes with a traceback in its text."""

    def __init__(self, images: CocoImages) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: Key) -> tuple[Tensor, Target] | str:
        try:
            return self.images[key]
        except DataError as error:
            return str(error)
