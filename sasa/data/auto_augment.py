"""RandAugment, TrivialAugmentWide and AutoAugment of a batch, with torchvision v2's operations, ranges and defaults.

Written with torchvision's public functionals, since its own classes draw from the global generator and take a batch for
one image; but those that resample or sharpen are here, since torchvision's copy their matrices to the device one by
one, each time waiting for all that the device was given before. tests/data/test_auto_augment.py compares all bitwise.

    rand     some operations an image, two by default, each at one magnitude of 0 to 30, 9 by default (Cubuk et al.,
             2019)
    trivial  one operation an image at any of 31 magnitudes, over wider ranges (Mueller and Hutter, 2021)
    auto     two operations of a policy found by search, each with its probability and magnitude (Cubuk et al., 2018)

Shapes: B images of a batch, C channels, H x W pixels.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from sasa.data.auto_augment_policies import POLICIES, policy_of
from sasa.data.transfer import to_device

KINDS = ("none", "rand", "trivial", "auto")
# The place of an operation is part of what is drawn: append only.
OPERATIONS = (
    "identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate", "brightness", "color", "contrast",
    "sharpness", "posterize", "solarize", "autocontrast", "equalize", "invert",
)  # fmt: skip
WITHOUT_INVERT = 14  # of them the first: rand and trivial do not invert
_SIGNED = frozenset(OPERATIONS[1:10])
_PLAIN = frozenset(("identity", "autocontrast", "equalize", "invert"))  # without a magnitude
_BINS = 31  # the most magnitudes of any kind


class _Space(NamedTuple):
    """The ranges of magnitudes of one kind; each begins at 0 but solarize's, whose strongest is the last."""

    bins: int
    shear: float
    translate: tuple[float, float]  # share of the side, and pixels
    rotate: float  # degrees
    enhance: float  # brightness, color, contrast, sharpness
    posterize: int  # bits lost at most


_SPACES = {
    "rand": _Space(31, 0.3, (150.0 / 331.0, 0.0), 30.0, 0.9, 4),
    "trivial": _Space(31, 0.99, (0.0, 32.0), 135.0, 0.99, 6),
    "auto": _Space(10, 0.3, (150.0 / 331.0, 0.0), 30.0, 0.9, 4),
}


def draw(rng: np.random.Generator, kind: str, count: int, dataset: str, rounds: int = 2, magnitude: int = 9) -> Tensor:
    """The operations of `count` images: (count, rounds) int64 codes for `apply`.

    Args:
        dataset: its name: AutoAugment has a policy for each family of data sets.
        rounds, magnitude: of rand: operations an image, and their magnitude.
    """
    if kind == "rand":
        drawn = rng.integers(0, 2 * WITHOUT_INVERT, (count, rounds))
        return _encode(drawn // 2, np.full_like(drawn, magnitude), drawn % 2)
    if kind == "trivial":
        operation = rng.integers(0, WITHOUT_INVERT, (count, 1))
        return _encode(operation, rng.integers(0, _SPACES["trivial"].bins, (count, 1)), rng.integers(0, 2, (count, 1)))
    operation, chance, strength = _policy_tables(policy_of(dataset))
    row = rng.integers(0, len(operation), count)
    used = rng.random((count, 2)) < chance[row]
    negative = rng.integers(0, 2, (count, 2))
    return _encode(np.where(used, operation[row], 0), strength[row], negative)


def _encode(operation: np.ndarray, magnitude: np.ndarray, negative: np.ndarray) -> Tensor:
    """One number for an operation with its magnitude and sign; equal for what does the same."""
    plain = np.array([name in _PLAIN for name in OPERATIONS])[operation]
    signed = np.array([name in _SIGNED for name in OPERATIONS])[operation]
    magnitude, negative = np.where(plain, 0, magnitude), np.where(signed, negative, 0)
    return torch.from_numpy(((operation * _BINS + magnitude) * 2 + negative).astype(np.int64))


@lru_cache
def _policy_tables(policy: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each row of a policy its two operations, their probabilities and magnitudes: (rows, 2) each."""
    rows = POLICIES[policy]
    operation = np.array([[OPERATIONS.index(step.operation) for step in row] for row in rows])
    return (
        operation,
        np.array([[step.chance for step in row] for row in rows]),
        np.array([[step.magnitude for step in row] for row in rows]),
    )


def apply(images: Tensor, codes: Tensor, kind: str) -> Tensor:
    """Each image with its own operations, one round after the other.

    Images that drew the same operation go through it together, which on a GPU is what makes it affordable; the
    operations regard one image at a time, so batch mates change nothing. What the device needs to know goes there by
    two copies, however many operations there are, and nothing waits for it.

    Args:
        images: (B, C, H, W) uint8, C = 1 or 3.
        codes: (B, rounds) int64 on the CPU, of `draw`.

    Returns:
        (B, C, H, W) uint8.
    """
    order = codes.argsort(stable=True, dim=0)  # (B, rounds): images of one operation side by side
    places = to_device(torch.stack((order, order.argsort(0))), images.device)  # and the way back
    grids = _grids(images, codes, kind)
    for turn, drawn in enumerate(codes.unbind(1)):
        kinds, counts = drawn.unique(return_counts=True)  # sorted, as `order` is
        groups = images[places[0, :, turn]].split(counts.tolist())
        done = [_operate(group, code, kind, grids) for group, code in zip(groups, kinds.tolist(), strict=True)]
        images = torch.cat(done)[places[1, :, turn]]
    return images


def _parts(code: int) -> tuple[str, int, int]:
    """Operation, magnitude and sign (1 or -1) of a code."""
    place, magnitude = divmod(code // 2, _BINS)
    return OPERATIONS[place], magnitude, -1 if code % 2 else 1


def _level(most: float, kind: str, magnitude: int) -> float:
    """The magnitude in a range that begins at 0, in torchvision's own rounding (fp32)."""
    return float(torch.linspace(0.0, most, _SPACES[kind].bins)[magnitude])


def _operate(images: Tensor, code: int, kind: str, grids: dict[int, Tensor]) -> Tensor:
    """The operation of one code on (B, C, H, W) uint8."""
    from torchvision.transforms.v2 import functional as F  # here, not above: a second of import that few runs need

    if code in grids:
        return _resample(images, grids[code])
    operation, magnitude, sign = _parts(code)
    space = _SPACES[kind]

    def enhanced() -> float:
        return 1.0 + sign * _level(space.enhance, kind, magnitude)

    def bits() -> int:
        return int((8 - torch.tensor(magnitude) / ((space.bins - 1) / space.posterize)).round())

    operations: dict[str, Callable[[], Tensor]] = {
        "identity": lambda: images,
        "rotate": lambda: F.rotate(images, sign * _level(space.rotate, kind, magnitude)),  # by quarter turns
        "brightness": lambda: F.adjust_brightness(images, enhanced()),
        "color": lambda: F.adjust_saturation(images, enhanced()),
        "contrast": lambda: F.adjust_contrast(images, enhanced()),
        "sharpness": lambda: _sharpen(images, enhanced()),
        "posterize": lambda: F.posterize(images, bits=bits()),
        "solarize": lambda: F.solarize(images, 255.0 * float(torch.linspace(1.0, 0.0, space.bins)[magnitude])),
        "autocontrast": lambda: F.autocontrast(images),
        "equalize": lambda: F.equalize(images),
        "invert": lambda: F.invert(images),
    }
    return operations[operation]()


# ---- what torchvision would copy to the device once an operation ----------------------------------------------------


def _grids(images: Tensor, codes: Tensor, kind: str) -> dict[int, Tensor]:
    """Of each code that resamples its images, the positions to read: (1, H, W, 2) in [-1, 1] on the images' device."""
    height, width = images.shape[2:]
    matrices = {code: _inverse(code, kind, height, width) for code in codes.unique().tolist()}
    matrices = {code: matrix for code, matrix in matrices.items() if matrix is not None}
    if not matrices:
        return {}
    half_sides = torch.tensor([0.5 * width, 0.5 * height])[:, None]
    theta = to_device(torch.tensor(list(matrices.values())) / half_sides, images.device)  # (codes, 2, 3)
    pixels = _pixels(height, width, images.device)
    return {
        code: pixels.bmm(theta[i : i + 1].transpose(1, 2)).view(1, height, width, 2) for i, code in enumerate(matrices)
    }


def _inverse(code: int, kind: str, height: int, width: int) -> list[list[float]] | None:
    """(2, 3): where an output pixel comes from, x then y from the middle; None: of no operation that resamples."""
    operation, magnitude, sign = _parts(code)
    space = _SPACES[kind]
    share, pixels = space.translate
    if operation in ("shear_x", "shear_y"):
        angle = math.radians(math.degrees(math.atan(sign * _level(space.shear, kind, magnitude))))
        slope = math.sin(angle) / math.cos(angle)
        if operation == "shear_x":  # the first row stays, as in the first column of shear_y
            return [[1.0, slope, slope * 0.5 * height], [0.0, 1.0, 0.0]]
        return [[1.0, 0.0, 0.0], [slope, 1.0, slope * 0.5 * width]]
    if operation == "translate_x":
        return [[1.0, 0.0, -float(int(sign * _level(share * width + pixels, kind, magnitude)))], [0.0, 1.0, 0.0]]
    if operation == "translate_y":
        return [[1.0, 0.0, 0.0], [0.0, 1.0, -float(int(sign * _level(share * height + pixels, kind, magnitude)))]]
    if operation == "rotate":
        degrees = sign * _level(space.rotate, kind, magnitude) % 360
        if degrees in (0, 180) or (degrees in (90, 270) and height == width):
            return None
        cos, sin = math.cos(math.radians(-degrees)), math.sin(math.radians(-degrees))
        return [[cos, sin, 0.0], [-sin, cos, 0.0]]
    return None


@lru_cache(maxsize=4)
def _pixels(height: int, width: int, device: torch.device) -> Tensor:
    """x and y of each pixel from the image's middle, and 1: (1, H * W, 3)."""
    with torch.inference_mode(False):  # kept for training too
        x, y = (torch.linspace((1.0 - n) * 0.5, (n - 1.0) * 0.5, n, device=device) for n in (width, height))
        y, x = torch.meshgrid(y, x, indexing="ij")
        return torch.stack((x, y, torch.ones_like(x)), 2).view(1, height * width, 3)


def _resample(images: Tensor, grid: Tensor) -> Tensor:
    """Nearest neighbour, black beyond the border: torchvision's defaults."""
    grid = grid.expand(len(images), -1, -1, -1)
    moved = functional.grid_sample(images.float(), grid, mode="nearest", padding_mode="zeros", align_corners=False)
    return moved.round_().to(torch.uint8)


@lru_cache(maxsize=4)
def _blur(device: torch.device) -> Tensor:
    """The weights of a 3 x 3 mean in which the middle counts five times: (1, 1, 3, 3)."""
    with torch.inference_mode(False):
        weights = torch.full((1, 1, 3, 3), 1 / 13, device=device)
        weights[..., 1, 1] = 5 / 13
        return weights


def _sharpen(images: Tensor, factor: float) -> Tensor:
    """Away from the blurred image by 1 - factor; pixels of the border stay."""
    channels, height, width = images.shape[1:]
    if height <= 2 or width <= 2:
        return images
    sharp = images.float()
    blurred = functional.conv2d(sharp, _blur(images.device).expand(channels, 1, 3, 3), groups=channels).round_()
    inner = sharp[..., 1:-1, 1:-1]
    inner.add_(blurred.sub_(inner), alpha=1.0 - factor)
    return sharp.clamp_(0, 255).to(torch.uint8)
