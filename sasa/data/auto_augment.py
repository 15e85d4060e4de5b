"""RandAugment, TrivialAugmentWide and AutoAugment of a batch, with torchvision v2's operations, ranges and defaults.

Written with torchvision's public functionals, since its own classes draw from the global generator and take a batch for
one image. tests/data/test_auto_augment.py compares both bitwise.

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

from sasa.data.auto_augment_policies import POLICIES, policy_of

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
    operations regard one image at a time, so batch mates change nothing.

    Args:
        images: (B, C, H, W) uint8, C = 1 or 3.
        codes: (B, rounds) int64 on the CPU, of `draw`.

    Returns:
        (B, C, H, W) uint8.
    """
    order = codes.argsort(stable=True, dim=0)  # (B, rounds): images of one operation side by side
    places = torch.stack((order, order.argsort(0))).to(images.device, non_blocking=True)  # and the way back: one copy
    for turn, drawn in enumerate(codes.unbind(1)):
        kinds, counts = drawn.unique(return_counts=True)  # sorted, as `order` is
        groups = images[places[0, :, turn]].split(counts.tolist())
        done = [_operate(group, code, kind) for group, code in zip(groups, kinds.tolist(), strict=True)]
        images = torch.cat(done)[places[1, :, turn]]
    return images


def _operate(images: Tensor, code: int, kind: str) -> Tensor:
    """The operation of one code on (B, C, H, W) uint8."""
    from torchvision.transforms.v2 import functional as F  # here, not above: a second of import that few runs need

    place, magnitude = divmod(code // 2, _BINS)
    height, width = images.shape[2:]
    space = _SPACES[kind]
    share, pixels = space.translate

    def level(most: float) -> float:
        """The magnitude in a range that begins at 0, in torchvision's own rounding (fp32)."""
        return float(torch.linspace(0.0, most, space.bins)[magnitude]) * (-1 if code % 2 else 1)

    def bits() -> int:
        return int((8 - torch.tensor(magnitude) / ((space.bins - 1) / space.posterize)).round())

    operations: dict[str, Callable[[], Tensor]] = {
        "identity": lambda: images,
        "shear_x": lambda: _affine(images, shear=[math.degrees(math.atan(level(space.shear))), 0.0], center=[0, 0]),
        "shear_y": lambda: _affine(images, shear=[0.0, math.degrees(math.atan(level(space.shear)))], center=[0, 0]),
        "translate_x": lambda: _affine(images, translate=[int(level(share * width + pixels)), 0]),
        "translate_y": lambda: _affine(images, translate=[0, int(level(share * height + pixels))]),
        "rotate": lambda: F.rotate(images, angle=level(space.rotate)),
        "brightness": lambda: F.adjust_brightness(images, 1.0 + level(space.enhance)),
        "color": lambda: F.adjust_saturation(images, 1.0 + level(space.enhance)),
        "contrast": lambda: F.adjust_contrast(images, 1.0 + level(space.enhance)),
        "sharpness": lambda: F.adjust_sharpness(images, 1.0 + level(space.enhance)),
        "posterize": lambda: F.posterize(images, bits=bits()),
        "solarize": lambda: F.solarize(images, 255.0 * float(torch.linspace(1.0, 0.0, space.bins)[magnitude])),
        "autocontrast": lambda: F.autocontrast(images),
        "equalize": lambda: F.equalize(images),
        "invert": lambda: F.invert(images),
    }
    return operations[OPERATIONS[place]]()


def _affine(images: Tensor, **change) -> Tensor:
    """Nearest neighbour, black beyond the border: torchvision's defaults."""
    from torchvision.transforms.v2 import functional as F

    still = {"angle": 0.0, "translate": [0, 0], "scale": 1.0, "shear": [0.0, 0.0]}
    return F.affine(images, **still | change)
