"""FLOPs of a detector's forward by the convention of sasa/analysis/flops.py, with the rules that detection adds."""

from torch import nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.retinanet import (
    RetinaNetClassificationHead,
    RetinaNetHead,
    RetinaNetRegressionHead,
)
from torchvision.ops import FeaturePyramidNetwork, FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from sasa.analysis.flops import Flops, count_flops
from sasa.detection.retinanet import Backbone, Maps, Shortcut, dense


def _merges(pyramid: FeaturePyramidNetwork, maps: dict, out: dict) -> dict[str, int]:
    """Each level but the coarsest of the backbone's adds what comes from above; nearest upsampling copies."""
    finer = list(out.values())[: len(pyramid.layer_blocks) - 1]
    return {"add": sum(level.numel() for level in finer)}


FLOPS = {
    FeaturePyramidNetwork: _merges,
    LastLevelP6P7: lambda m, levels, out: {"relu": out[0][-2].numel()},  # of P6, before P7
    Shortcut: lambda m, x, out: {"add": out.numel()},
    FrozenBatchNorm2d: lambda m, x, out: {"batch norm": 2 * out.numel()},
    **dict.fromkeys(
        (Backbone, Maps, RetinaNetHead, RetinaNetClassificationHead, RetinaNetRegressionHead, nn.ModuleList),
        lambda m, x, out: {},
    ),
}


def detector_flops(detector: RetinaNet, image_size: int) -> Flops:
    """FLOPs for one image of image_size x image_size pixels: backbone, pyramid and heads.

    Anchors, their decoding and the suppression of duplicates are not part of it: they depend on what is found.
    """
    return count_flops(dense(detector), image_size, rules=FLOPS)
