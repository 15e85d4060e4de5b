"""Random erasing (Zhong et al., 2017): a rectangle of some images set to the data set's mean.

Areas, aspects and tries are torchvision's RandomErasing's, and so is the value: 0 after normalisation.
Shapes: B images of a batch, C channels, H x W pixels.
"""

import math

import numpy as np
import torch
from torch import Tensor

from sasa.data.transfer import to_device

TRIES = 10
AREA, ASPECT = (0.02, 0.33), (0.3, 3.3)  # share of the area, height / width


def draw(rng: np.random.Generator, count: int, height: int, width: int, probability: float) -> Tensor:
    """The rectangles of `count` images: (count, 4) int64, first row, first column, rows, columns; no rows is none.

    Of each image's tries the first is taken that is smaller than the image on both sides.
    """
    erased = rng.random(count) < probability
    area, aspect, down, right = np.moveaxis(rng.random((count, TRIES, 4)), 2, 0)  # (count, TRIES) each
    pixels = height * width * (AREA[0] + (AREA[1] - AREA[0]) * area)
    ratio = np.exp(math.log(ASPECT[0]) + (math.log(ASPECT[1]) - math.log(ASPECT[0])) * aspect)
    rows, columns = np.rint(np.sqrt(pixels * ratio)), np.rint(np.sqrt(pixels / ratio))
    fits = (rows < height) & (columns < width)
    top, left = np.floor(down * (height - rows + 1)), np.floor(right * (width - columns + 1))
    boxes = np.stack((top, left, rows, columns), 2)[np.arange(count), fits.argmax(1)]  # (count, 4), the first that fits
    return torch.from_numpy(np.where((erased & fits.any(1))[:, None], boxes, 0).astype(np.int64))


def erase(images: Tensor, boxes: Tensor) -> Tensor:
    """Each image with its own rectangle set to 0. (B, C, H, W), boxes (B, 4) of `draw` -> the same shape."""
    top, left, rows, columns = to_device(boxes, images.device)[:, :, None].unbind(1)  # (B, 1) each
    row = torch.arange(images.shape[2], device=images.device) - top  # (B, H)
    column = torch.arange(images.shape[3], device=images.device) - left  # (B, W)
    hole = ((row >= 0) & (row < rows))[:, :, None] & ((column >= 0) & (column < columns))[:, None, :]  # (B, H, W)
    return images.clone().masked_fill_(hole[:, None], 0)  # which keeps the memory format
