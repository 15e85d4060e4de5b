"""Images of one's own, fed to a network as its run's evaluation feeds those of its data set."""

from typing import Any

import torch
from torch import Tensor

from config import Config
from preprocess import DataInfo
from sasa.data.images import Evaluated
from sasa.data.specs import SPECS

EVALUATION = ("eval_size", "eval_crop", "eval_interpolation")  # the fields of Config that say how
LUMA = (0.299, 0.587, 0.114)  # of ITU-R BT.601, as PIL makes gray pictures


def evaluated(config: Config, info: DataInfo, given: dict[str, Any]) -> Evaluated:
    """How images are cropped and resized: as the run evaluates, but for the fields given."""
    values = {key: getattr(config, key) for key in EVALUATION} | given
    size = values["eval_size"] or info.image_size
    return Evaluated(size, round(size / values["eval_crop"]), values["eval_interpolation"])


def as_in_the_set(images: Tensor, info: DataInfo) -> Tensor:
    """(B, 3, H, W), normalised alike in each channel -> gray as three equal channels where the data set is gray."""
    if len(SPECS[info.name].mean) != 1:
        return images
    weights = torch.tensor(LUMA, device=images.device, dtype=images.dtype).view(1, 3, 1, 1)
    return (images * weights).sum(1, keepdim=True).expand(-1, 3, -1, -1)
