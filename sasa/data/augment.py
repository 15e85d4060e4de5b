"""Augmentation of whole batches on the device, and mixing: pure functions of images and of numbers drawn beforehand.

Nothing here touches a global random state. `draw` makes every random number of one step, for the whole global batch,
from a numpy generator on the CPU; `Draws.take` is one process's part; `augment_images` and `mix` apply it. What an
image becomes is therefore the same on a CPU and on a GPU up to rounding, and bitwise the same whatever the number of
processes: every quantity is computed for the global batch before it is cut, and applied element by element.

Shapes: B batch, C channels (1 for gray sets: `batches.normalise` expands them to 3 afterwards), H x W image.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sasa.data import auto_augment
from sasa.data.transfer import to_device

CROP_TRIES = 10  # as torchvision's RandomResizedCrop


@dataclass(frozen=True)
class AugmentConfig:
    """What is done to training images; all zero is nothing. Lengths are in pixels of the image as it is fed.

    pad: random crop out of an image padded by this much on each side, which is a shift of up to `pad` pixels
    flip: mirrored left to right, half of the time
    rotate, translate, zoom: one affine resampling: up to this many degrees, this share of the side, this scale +-
    cutout: side of a square set to the data set's mean, centred anywhere, clipped at the border
    auto_augment: none, rand, trivial or auto (`sasa.data.auto_augment`), before the affine resampling; rand does
        rand_rounds operations an image at rand_magnitude
    random_erase: share of the images of which a rectangle is set to the mean (`sasa.data.erasing`)
    mixup, cutmix: alpha of the Beta distribution; where both are given, each step takes one of them, evenly
    reflect: what a shifted or rotated image shows beyond its border: itself mirrored, rather than black
    crop_area, crop_aspect: of the random resized crop of image trees: smallest share of the area, widest width / height
    repeats: how often each image of a step stands in its global batch, augmented anew each time
    """

    pad: int = 0
    flip: bool = False
    rotate: float = 0.0
    translate: float = 0.0
    zoom: float = 0.0
    cutout: int = 0
    auto_augment: str = "none"
    random_erase: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    reflect: bool = False
    rand_rounds: int = 2
    rand_magnitude: int = 9
    crop_area: float = 0.08
    crop_aspect: float = 4 / 3
    repeats: int = 1

    def __post_init__(self) -> None:
        for name in ("pad", "rotate", "translate", "zoom", "cutout", "mixup", "cutmix"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be finite and not negative, got {value}")
        for name in ("translate", "zoom"):
            if getattr(self, name) >= 1:
                raise ValueError(f"{name} is a share of the image and must be below 1, got {getattr(self, name)}")
        if self.auto_augment not in auto_augment.KINDS:
            raise ValueError(f"auto_augment must be one of {auto_augment.KINDS}, got {self.auto_augment!r}")
        if not 0 <= self.random_erase <= 1:
            raise ValueError(f"random_erase is a share of the images, 0 to 1, got {self.random_erase}")
        if self.repeats < 1:
            raise ValueError(f"repeats must be at least 1, got {self.repeats}")

    @property
    def affine(self) -> bool:
        return bool(self.rotate or self.translate or self.zoom)

    @property
    def geometric(self) -> bool:
        """Whether it does what RandomResizedCrop does for image trees."""
        return bool(self.pad or self.affine)


# The place is part of every stream: append only.
_PURPOSES = ("order", "augment", "mix", "holdout", "sample", "part", "erase", "drop_path")


def stream(seed: int, purpose: str, *key: int) -> np.random.Generator:
    """The random numbers that belong to this purpose and key alone, such as (epoch, step)."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(_PURPOSES.index(purpose), *key)))


class Draws(NamedTuple):
    """Random numbers of B images; None where the configuration does not ask for them."""

    shift: Tensor | None  # (B, 2) int64, rows and columns by which the crop starts off the image
    flip: Tensor | None  # (B,) bool
    theta: Tensor | None  # (B, 2, 3) output position -> input position, both in [-1, 1]
    cutout: Tensor | None  # (B, 2) int64, row and column of the first pixel of the square (may lie outside)
    ops: Tensor | None  # (B, rounds) int64, of `auto_augment.draw`
    crop: Tensor | None = None  # (B, CROP_TRIES, 4) float64 in [0, 1), for `crop_box`: image trees only
    erase: Tensor | None = None  # (B, 4) int64, of `erasing.draw`

    def take(self, index: Tensor) -> "Draws":
        """The numbers of the images at these positions of the global batch."""
        return Draws(*(None if field is None else field[index] for field in self))


class Mix(NamedTuple):
    """One step's mixing: image = weight * own + (1 - weight) * partner, or the partner's pixels inside the box."""

    weight: float
    box: tuple[int, int, int, int] | None  # top, left, bottom, right; None is mixup


def draw(
    rng: np.random.Generator, count: int, height: int, width: int, config: AugmentConfig, dataset: str = ""
) -> Draws:
    """What is random about `count` images, in a fixed order: each kind's numbers do not depend on the others.

    Rectangles to erase and resized crops are drawn from streams of their own: `erasing.draw`, `draw_crops`.

    Args:
        dataset: its name, for AutoAugment's policy.
    """
    uniform = rng.random((count, 8), dtype=np.float32).astype(np.float64)
    signed = 2 * uniform - 1
    shift = flip = theta = cutout = ops = None
    if config.pad:
        shift = torch.from_numpy(np.floor(uniform[:, :2] * (2 * config.pad + 1)).astype(np.int64) - config.pad)
    if config.flip:
        flip = torch.from_numpy(uniform[:, 2] < 0.5)
    if config.affine:
        theta = _theta(
            np.deg2rad(config.rotate * signed[:, 3]),
            config.translate * signed[:, 4:6],
            1 + config.zoom * signed[:, 6],
            height / width,
        )
    # Drawn last and by their own calls, so that asking for them leaves the numbers above as they are.
    centre = rng.integers(0, (height, width), (count, 2))
    if config.auto_augment != "none":
        rounds, magnitude = config.rand_rounds, config.rand_magnitude
        ops = auto_augment.draw(rng, config.auto_augment, count, dataset, rounds, magnitude)
    if config.cutout:
        cutout = torch.from_numpy(centre - config.cutout // 2)
    return Draws(shift, flip, theta, cutout, ops)


def _theta(angle: np.ndarray, shift: np.ndarray, scale: np.ndarray, aspect: float) -> Tensor:
    """(B, 2, 3) matrices that turn by angle (counter-clockwise as seen), enlarge by scale, move by shift.

    angle (B,) in radians; shift (B, 2) share of the side, down and right; scale (B,); aspect is H / W, because
    a rotation in positions that run from -1 to 1 along both sides would be a shear where the sides differ.
    """
    cos, sin = np.cos(angle) / scale, np.sin(angle) / scale
    down, right = 2 * shift[:, 0], 2 * shift[:, 1]  # the side is 2 long
    x = np.stack((cos, -sin * aspect, -cos * right + sin * aspect * down), 1)  # (B, 3)
    y = np.stack((sin / aspect, cos, -sin / aspect * right - cos * down), 1)
    return torch.from_numpy(np.stack((x, y), 1).astype(np.float32))  # (B, 2, 3)


def draw_crops(rng: np.random.Generator, count: int) -> Tensor:
    """The numbers of `count` random resized crops, whatever the size of the images: (count, CROP_TRIES, 4) float64."""
    return torch.from_numpy(rng.random((count, CROP_TRIES, 4)))


def crop_box(
    uniform: np.ndarray,
    height: int,
    width: int,
    least: float = AugmentConfig.crop_area,
    widest: float = AugmentConfig.crop_aspect,
) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a random resized crop out of an image of this many pixels.

    uniform: (CROP_TRIES, 4) in [0, 1), for each try the area, the aspect (in its logarithm), top and left. The first
    try that fits is taken; where none does, the largest central crop of an allowed aspect. Distributed as torchvision's
    RandomResizedCrop.get_params, which reads the global generator and takes 28 times as long (2.8 and 78 us).

    Args:
        least: smallest share of the area. widest: largest width / height; its inverse is the smallest.
    """
    narrow = 1 / widest
    for area, aspect, down, right in uniform.tolist():
        pixels = (least + (1.0 - least) * area) * height * width
        ratio = narrow * (widest / narrow) ** aspect
        w, h = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(down * (height - h + 1)), int(right * (width - w + 1)), h, w
    w, h = min(width, round(height * widest)), min(height, round(width / narrow))
    return (height - h) // 2, (width - w) // 2, h, w


def augment_images(images: Tensor, draws: Draws, config: AugmentConfig) -> Tensor:
    """(B, C, H, W) uint8 -> (B, C, H, W), cropped, flipped, auto-augmented, resampled; uint8 unless resampled.

    Cutout, erasing and mixing come after normalisation: `cutout`, `erasing.erase` and `mix`.
    """

    def there(field: Tensor | None) -> Tensor | None:
        return None if field is None else to_device(field, images.device)

    if draws.shift is not None or draws.flip is not None:
        images = crop_flip(images, there(draws.shift), there(draws.flip), config.reflect)
    if draws.ops is not None:
        images = auto_augment.apply(images, draws.ops, config.auto_augment)
    if draws.theta is not None:
        images = resample(images.float(), there(draws.theta), config.reflect)
    return images


def crop_flip(images: Tensor, shift: Tensor | None, flip: Tensor | None, reflect: bool = False) -> Tensor:
    """Each image shifted by its own offset, then mirrored: at most one gather. (B, C, H, W) -> the same shape.

    shift (B, 2): output row r shows input row r + shift[0]; |shift| below the side where reflect is True.
    """
    if shift is None:
        return torch.where(flip[:, None, None, None], images.flip(-1), images)
    batch, channels, height, width = images.shape
    row = torch.arange(height, device=images.device)[None]  # (1, H)
    col = torch.arange(width, device=images.device)[None]  # (1, W)
    if flip is not None:
        col = torch.where(flip[:, None], width - 1 - col, col)  # (B, W)
    row, col = row + shift[:, :1], col + shift[:, 1:]  # (B, H), (B, W)
    if reflect:  # about the first and the last pixel, which are not repeated
        row = (height - 1) - ((height - 1) - row.abs()).abs()
        col = (width - 1) - ((width - 1) - col.abs()).abs()
    source = row.clamp(0, height - 1)[:, :, None] * width + col.clamp(0, width - 1)[:, None, :]  # (B, H, W)
    source = source.flatten(1)[:, None].expand(batch, channels, height * width)
    out = images.flatten(2).gather(2, source).view(batch, channels, height, width)
    if not reflect:
        inside = ((row >= 0) & (row < height))[:, :, None] & ((col >= 0) & (col < width))[:, None, :]  # (B, H, W)
        out.mul_(inside[:, None])
    return out


def resample(images: Tensor, theta: Tensor, reflect: bool = False) -> Tensor:
    """Bilinear affine resampling, black beyond the border. (B, C, H, W) float, theta (B, 2, 3) -> (B, C, H, W).

    The grid is made by products and sums of elements: affine_grid's batched product may round differently when the
    batch is cut among processes.
    """
    height, width = images.shape[2:]
    y = ((2 * torch.arange(height, device=images.device) + 1) / height - 1)[:, None]  # (H, 1), centres of pixels
    x = ((2 * torch.arange(width, device=images.device) + 1) / width - 1)[None]  # (1, W)
    t = theta[..., None, None]  # (B, 2, 3, 1, 1)
    grid = t[:, :, 0] * x + t[:, :, 1] * y + t[:, :, 2]  # (B, 2, H, W), x then y
    border = "reflection" if reflect else "zeros"
    return F.grid_sample(images, grid.permute(0, 2, 3, 1), mode="bilinear", padding_mode=border, align_corners=False)


def cutout(images: Tensor, corner: Tensor, side: int) -> Tensor:
    """A square of each image set to zero, which after normalisation is the mean. (B, C, H, W), corner (B, 2)."""
    corner = to_device(corner, images.device)
    height, width = images.shape[2:]
    row = torch.arange(height, device=images.device) - corner[:, :1]  # (B, H)
    col = torch.arange(width, device=images.device) - corner[:, 1:]  # (B, W)
    hole = ((row >= 0) & (row < side))[:, :, None] & ((col >= 0) & (col < side))[:, None, :]  # (B, H, W)
    return images.clone().masked_fill_(hole[:, None], 0)  # which keeps the memory format


def draw_mix(rng: np.random.Generator, height: int, width: int, config: AugmentConfig) -> Mix | None:
    """One step's mixing, as torchvision v2's MixUp and CutMix draw it: one weight, one box for the whole batch."""
    if not (config.mixup or config.cutmix):
        return None
    choose_mixup = rng.random() < 0.5
    if config.mixup and (choose_mixup or not config.cutmix):
        return Mix(rng.beta(config.mixup, config.mixup), None)
    half = 0.5 * math.sqrt(1 - rng.beta(config.cutmix, config.cutmix))
    centre_y, centre_x = int(rng.integers(height)), int(rng.integers(width))
    top, bottom = max(centre_y - int(half * height), 0), min(centre_y + int(half * height), height)
    left, right = max(centre_x - int(half * width), 0), min(centre_x + int(half * width), width)
    # The weight is the share of pixels that the clipped box leaves, not the one that was drawn.
    return Mix(1 - (bottom - top) * (right - left) / (height * width), (top, left, bottom, right))


def mix(images: Tensor, labels: Tensor, num_classes: int, drawn: Mix) -> tuple[Tensor, Tensor]:
    """Each image mixed with the one before it, as torchvision v2's MixUp and CutMix pair them.

    images (B + 1, C, H, W) float and labels (B + 1,) int64, where row 0 is the predecessor of row 1 in the global
    batch (its last image for the first) -> images (B, C, H, W), soft targets (B, num_classes) that sum to 1.
    """
    # Not F.one_hot, which on the CPU reads the labels' range: nothing in a step waits for a value.
    targets = (labels[:, None] == torch.arange(num_classes, device=labels.device)).to(images.dtype)
    targets = targets[1:] * drawn.weight + targets[:-1] * (1 - drawn.weight)
    if drawn.box is None:
        return images[1:] * drawn.weight + images[:-1] * (1 - drawn.weight), targets
    top, left, bottom, right = drawn.box
    mixed = images[1:].clone()
    mixed[..., top:bottom, left:right] = images[:-1, :, top:bottom, left:right]
    return mixed, targets
