"""RandAugment (Cubuk et al., 2019) of a batch, with torchvision v2's operations, ranges and defaults.

Written with torchvision's public functionals, since its own `RandAugment` draws from the global generator and takes a
batch for one image. tests/data/test_randaugment.py compares the two bitwise.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

BINS = 31  # magnitudes are 0 to 30: what a magnitude means, as in torchvision
# The place of an operation is what `augment.draw` draws: append only.
OPERATIONS = (
    "identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate", "brightness", "color", "contrast",
    "sharpness", "posterize", "solarize", "autocontrast", "equalize",
)  # fmt: skip


def apply(images: Tensor, ops: Tensor, magnitude: int = 9) -> Tensor:
    """Each image with its own operations, one round after the other.

    Images that drew the same operation go through it together, which on a GPU is what makes it affordable; the
    operations regard one image at a time, so batch mates change nothing.

    Args:
        images: (B, C, H, W) uint8, C = 1 or 3.
        ops: (B, rounds) int64 on the CPU, 2 * place in OPERATIONS + 1 where the sign is negative.
        magnitude: of every operation, below BINS.

    Returns:
        (B, C, H, W) uint8.
    """
    order = ops.argsort(stable=True, dim=0)  # (B, rounds): images of one operation side by side
    places = torch.stack((order, order.argsort(0))).to(images.device, non_blocking=True)  # and the way back: one copy
    for turn, drawn in enumerate(ops.unbind(1)):
        kinds, counts = drawn.unique(return_counts=True)  # sorted, as `order` is
        groups = images[places[0, :, turn]].split(counts.tolist())
        done = [
            _operate(group, OPERATIONS[op // 2], op % 2, magnitude)
            for group, op in zip(groups, kinds.tolist(), strict=True)
        ]
        images = torch.cat(done)[places[1, :, turn]]
    return images


def _operate(images: Tensor, name: str, negative: int, magnitude: int) -> Tensor:
    """One operation of OPERATIONS on (B, C, H, W) uint8."""
    from torchvision.transforms.v2 import functional as F  # here, not above: a second of import that few runs need

    height, width = images.shape[2:]

    def level(most: float) -> float:
        """The magnitude in a range that begins at 0, in torchvision's own rounding (fp32)."""
        return float(torch.linspace(0.0, most, BINS)[magnitude]) * (-1 if negative else 1)

    operations: dict[str, Callable[[], Tensor]] = {
        "identity": lambda: images,
        "shear_x": lambda: _affine(images, shear=[math.degrees(math.atan(level(0.3))), 0.0], center=[0, 0]),
        "shear_y": lambda: _affine(images, shear=[0.0, math.degrees(math.atan(level(0.3)))], center=[0, 0]),
        "translate_x": lambda: _affine(images, translate=[int(level(150.0 / 331.0 * width)), 0]),
        "translate_y": lambda: _affine(images, translate=[0, int(level(150.0 / 331.0 * height))]),
        "rotate": lambda: F.rotate(images, angle=level(30.0)),
        "brightness": lambda: F.adjust_brightness(images, 1.0 + level(0.9)),
        "color": lambda: F.adjust_saturation(images, 1.0 + level(0.9)),
        "contrast": lambda: F.adjust_contrast(images, 1.0 + level(0.9)),
        "sharpness": lambda: F.adjust_sharpness(images, 1.0 + level(0.9)),
        "posterize": lambda: F.posterize(images, bits=8 - round(4 * magnitude / (BINS - 1))),
        "solarize": lambda: F.solarize(images, threshold=255.0 * float(torch.linspace(1.0, 0.0, BINS)[magnitude])),
        "autocontrast": lambda: F.autocontrast(images),
        "equalize": lambda: F.equalize(images),
    }
    return operations[name]()


def _affine(images: Tensor, **change) -> Tensor:
    """Nearest neighbour, black beyond the border: torchvision's defaults."""
    from torchvision.transforms.v2 import functional as F

    still = {"angle": 0.0, "translate": [0, 0], "scale": 1.0, "shear": [0.0, 0.0]}
    return F.affine(images, **still | change)
