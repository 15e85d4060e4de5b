"""The way of a batch but for its pixels: `plan`, which images and which random numbers, and `transform`, on the device.

Shapes: B images of a batch, H x W pixels. Images come out normalised, (B, 3, H, W) float32. Gray sets are stored with
one channel and fed as three equal ones: the network then has the shapes, the parameter counts and the attention stem of
the paper for every set, and weights move from one set to another; the price is a first layer that sees each pixel three
times.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from sasa.data import erasing
from sasa.data.augment import AugmentConfig, Draws, Mix, augment_images, cutout, draw, draw_crops, draw_mix, mix, stream
from sasa.data.errors import DataError


@dataclass(frozen=True)
class DataInfo:
    """A data set as the network is fed with it. mean and std are of images in [0, 1]; sizes are sides in pixels."""

    name: str
    num_classes: int
    class_names: tuple[str, ...]
    image_size: int
    channels: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    train_size: int
    test_size: int
    holdout_size: int
    eval_size: int | None = None  # of evaluated images; None is image_size


# ---- plan -----------------------------------------------------------------------------------------------------------


class Piece(NamedTuple):
    """What one process takes of one global batch at a time."""

    index: Tensor  # (B,) int64 on the CPU; where mixed, (B + 1,) with the predecessor of the first in front
    draws: Draws  # of the same images
    mixing: Mix | None


def epoch_order(size: int, seed: int, epoch: int) -> Tensor:
    """The order of an epoch: a permutation of range(size), (size,) int64."""
    return torch.from_numpy(stream(seed, "order", epoch).permutation(size))


def steps_per_epoch(size: int, batch_size: int, world_size: int = 1, accumulate: int = 1) -> int:
    """Optimizer steps in an epoch of `size` images: whole global batches only, at least one.

    The images of the last and smaller batch would weigh more than others; each epoch leaves out other ones. A set
    smaller than one global batch makes one step of all its images.
    """
    return max(size // (batch_size * world_size * accumulate), 1)


def plan(
    info: DataInfo,
    size: int,
    epoch: int,
    start_step: int = 0,
    *,
    batch_size: int,
    accumulate: int = 1,
    rank: int = 0,
    world_size: int = 1,
    seed: int = 0,
    augment: AugmentConfig | None = None,
    global_batch: int | None = None,
    crops: bool = False,
) -> Iterator[Piece]:
    """Which images of `size`, and which random numbers, this process takes in an epoch, from start_step on.

    The global batch of a step has global_batch images, by default batch_size * accumulate * world_size, and all of the
    set where that is less. It is bitwise that of a single process; each process takes its own part in `accumulate`
    pieces, whose sizes differ by one where it does not divide.

    Args:
        augment: None is nothing.
        crops: the numbers of a random resized crop too: image trees.

    Raises:
        DataError: a step has fewer images than accumulate * world_size.
    """
    pieces = accumulate * world_size
    total = min(global_batch or batch_size * pieces, size)
    if total < pieces:
        what = f"{total} training images" if total == size else f"{total} images a step"
        raise DataError(f"{info.name}: {what} are too few for {pieces} batches at a time")
    parts = own_pieces(total, accumulate, rank, world_size)
    config, side = augment or AugmentConfig(), info.image_size
    distinct = -(-total // config.repeats)  # images of a step; copies of one stand this far apart

    def steps() -> Iterator[Piece]:
        order, mixed = epoch_order(size, seed, epoch), config.mixup or config.cutmix
        for step in range(start_step, steps_per_epoch(size, total)):
            draws = draw(stream(seed, "augment", epoch, step), total, side, side, config, info.name)
            if crops:
                draws = draws._replace(crop=draw_crops(stream(seed, "sample", epoch, step), total))
            if config.random_erase:
                boxes = erasing.draw(stream(seed, "erase", epoch, step), total, side, side, config.random_erase)
                draws = draws._replace(erase=boxes)
            mixing = draw_mix(stream(seed, "mix", epoch, step), side, side, config) if mixed else None
            for part in parts:
                position = torch.arange(part.start - 1 if mixed else part.start, part.stop) % total
                yield Piece(order[step * distinct + position % distinct], draws.take(position), mixing)

    return steps()


def own_pieces(total: int, accumulate: int, rank: int, world_size: int) -> list[range]:
    """The positions in a global batch of `total` images that one process takes, piece by piece."""
    pieces = accumulate * world_size
    bounds = [total * i // pieces for i in range(rank * accumulate, (rank + 1) * accumulate + 1)]
    return [range(first, stop) for first, stop in pairwise(bounds)]


def own_part(size: int, batch_size: int, rank: int, world_size: int) -> Iterator[range]:
    """The positions that one of several processes evaluates, by batches: each belongs to exactly one process."""
    start, stop = size * rank // world_size, size * (rank + 1) // world_size
    for first in range(start, stop, batch_size):
        yield range(first, min(first + batch_size, stop))


# ---- transform ------------------------------------------------------------------------------------------------------


def transform(
    images: Tensor,
    labels: Tensor,
    piece: Piece,
    config: AugmentConfig,
    info: DataInfo,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> tuple[Tensor, Tensor]:
    """Augmented, normalised, cut out, erased and mixed, on the images' device and in this memory format.

    Args:
        images: (B, 1 or 3, H, W) uint8, one more where mixed.
        labels: (B,) int64, one more where mixed.

    Returns:
        (B, 3, H, W) float32, and labels (B,) or soft targets (B, classes).
    """
    images = normalise(augment_images(images, piece.draws, config), info, memory_format)
    if piece.draws.cutout is not None:
        images = cutout(images, piece.draws.cutout, config.cutout)
    if piece.draws.erase is not None:
        images = erasing.erase(images, piece.draws.erase)
    if piece.mixing is not None:
        return mix(images, labels, info.num_classes, piece.mixing)
    return images, labels


def normalise(images: Tensor, info: DataInfo, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
    """(B, 1 or 3, H, W) in [0, 255] -> (B, 3, H, W) float32 in this memory format; one channel becomes three."""
    _, _, scale, shift = _statistics(info.mean, info.std, images.device)
    images = images.expand(-1, 3, -1, -1).to(torch.float32, memory_format=memory_format)
    return images.mul(scale).add_(shift)


def denormalise(images: Tensor, info: DataInfo) -> Tensor:
    """Pictures of a normalised batch: (B, 3, H, W) -> the same in [0, 1]."""
    mean, std, _, _ = _statistics(info.mean, info.std, images.device)
    return images.float().mul(std).add(mean).clamp(0, 1)


@lru_cache
def _statistics(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, ...]:
    """(3, 1, 1) each on the device, copied there once: mean, std, and the scale and shift that normalise [0, 255]."""
    with torch.inference_mode(False):  # the tensors are kept for training too
        mean, std = (torch.tensor(values, device=device).view(-1, 1, 1) for values in (mean, std))
        return mean, std, 1 / (255 * std), -mean / std
