"""RetinaNet (Lin et al. 2017) with local attention in backbone, feature pyramid and heads: the paper's Table 2.

image -> ResNet's stages 2 to 4 (strides 8, 16, 32) -> feature pyramid P3..P7 (strides 8 to 128) -> two heads, each the
same for all levels -> class logits and box offsets of every anchor. Network, anchors, losses and post-processing are
torchvision's `RetinaNet`; what is ours is put in place of its 3x3 convolutions.

Two readings of the paper. Its table fits attention in the heads with a convolution pyramid; its appendix replaces every
3x3 convolution, the pyramid's too, where a strided one becomes attention and a 2x2 average pool. `heads` and `fpn` are
therefore two switches. Decisions where the paper is silent:
    anchors              3 ratios x 2 scales a place: of the usual choices only 90 or 91 classes with six anchors give
                         the table's parameters.
    P6                   from P5, not from the backbone's last map: same reason.
    predictor            the heads' last 3x3 convolution becomes attention of the same width, then a 1x1 convolution.
    norm                 none in pyramid and heads, as torchvision's, and biases only where they are convolutions.

Shapes: B batch, C channels, H x W map, L levels, A anchors a place.
"""

import math
from collections import OrderedDict
from functools import partial

import torch
from torch import Tensor, nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import FeaturePyramidNetwork, FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

import model
from attention import LocalAttention2d
from sasa.backbone import FEATURES
from sasa.data.specs import SPECS

KINDS = ("conv", "attention")
NORMS = ("plain", "frozen", "sync")
LEVELS = 5  # P3 to P7
RATIOS = (0.5, 1.0, 2.0)  # height / width of the anchors
IMAGENET_MEAN, IMAGENET_STD = SPECS["IMAGENET"].mean, SPECS["IMAGENET"].std


class Backbone(nn.Module):
    """Images (B, 3, H, W) -> the maps P3 to P7 by name, each (B, out_channels, ceil(H / stride), ceil(W / stride)).

    `body` is a `model.ResNet` in the ImageNet form, whose stages have strides 4 to 32; the pyramid uses 8 to 32.
    `frozen`: its first parts (stem, layer1, ...) that are not trained and whose batch norms do not move.
    """

    def __init__(self, body: model.ResNet, fpn: FeaturePyramidNetwork, out_channels: int, frozen: int = 0) -> None:
        super().__init__()
        self.body, self.fpn, self.out_channels = body, fpn, out_channels
        self.frozen = [getattr(body, name) for name in FEATURES[:frozen]]
        for part in self.frozen:
            part.requires_grad_(False)

    def features(self, x: Tensor) -> list[Tensor]:
        """The four stages' maps, strides 4, 8, 16, 32."""
        x = self.body.stem(x)
        maps = []
        for stage in (self.body.layer1, self.body.layer2, self.body.layer3, self.body.layer4):
            x = stage(x)
            maps.append(x)
        return maps

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        c3, c4, c5 = self.features(x)[1:]
        return self.fpn(OrderedDict(p3=c3, p4=c4, p5=c5))

    def train(self, mode: bool = True) -> "Backbone":
        super().train(mode)
        for part in self.frozen:
            part.eval()
        return self


def retinanet(
    backbone: str = "ResNet50",
    stem: bool = False,
    heads: str = "conv",
    fpn: str = "conv",
    num_classes: int = 90,
    scales: int = 2,
    *,
    fpn_channels: int = 256,
    anchor_size: float = 32.0,
    image_size: int = 640,
    mean: tuple[float, float, float] = IMAGENET_MEAN,
    std: tuple[float, float, float] = IMAGENET_STD,
    batch_norm: str = "plain",
    frozen_parts: int = 0,
    head_std: float = 0.01,
    head_shortcuts: bool = False,
    **backbone_options,
) -> RetinaNet:
    """A detector: torchvision's `RetinaNet` interface, with labels from 0 to num_classes - 1 (no background class).

    Args:
        backbone: a name of `model.VARIANTS`.
        stem: the attention stem instead of the convolution.
        heads, fpn: "conv" or "attention", what stands for the 3x3 convolutions of the heads and of the pyramid.
        num_classes: class logits an anchor.
        scales: anchor sizes a level, spaced evenly between two levels in the logarithm; times 3 ratios.
        fpn_channels: width of pyramid and heads.
        anchor_size: side of the smallest square anchor in pixels, on the level of stride 8; each level doubles it.
        image_size: longer side of the images as the network takes them, pixels; others are resized to it.
        mean, std: of images in [0, 1], three channels.
        batch_norm: "plain", "frozen" (constants: no parameter, statistics of the checkpoint) or "sync" (over ranks).
        frozen_parts: how many of stem, layer1, ..., layer4 are not trained.
        head_std: standard deviation of the heads' weights at the start, of 3x3 convolutions (0.01: Lin et al. 2017)
            or of attention's value weights (0.01: the paper's appendix).
        head_shortcuts: add its input to the output of each layer of the heads but a predictor's convolution. With small
            weights a head then starts close to the identity. Without shortcuts five layers of attention average a place
            with its neighbours, and the heads need many steps to find places apart.
        **backbone_options: of `model.ResNet`; `kernel_size`, `num_heads`, `border`, `backend` and the other options of
            `attention.LocalAttention2d` hold for attention in pyramid and heads too.

    Raises:
        ValueError: a value out of its range, or options that do not go together in a layer.
        TypeError: an option that no layer has.
    """
    _check_choice("heads", heads, KINDS)
    _check_choice("fpn", fpn, KINDS)
    _check_choice("batch_norm", batch_norm, NORMS)
    for name, value in (("num_classes", num_classes), ("scales", scales), ("fpn_channels", fpn_channels)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r}: must be an integer of at least 1")
    if frozen_parts not in range(6):
        raise ValueError(f"frozen_parts={frozen_parts!r}: must be 0 to 5, parts of stem, layer1, ..., layer4")
    for name, value in (("anchor_size", anchor_size), ("head_std", head_std)):
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name}={value}: must be a finite number above 0")
    if backbone_options.get("small_images"):
        raise ValueError("small_images=True: a detector's backbone is in the ImageNet form, of strides 4 to 32")

    num_heads = backbone_options.get("num_heads", 8)
    if "attention" in (heads, fpn) and fpn_channels % (2 * num_heads):
        raise ValueError(f"fpn_channels={fpn_channels}: attention needs a multiple of 2 * num_heads = {2 * num_heads}")

    body = model.build(backbone, 0, stem, **backbone_options)
    layer_options = {
        key: value
        for key, value in backbone_options.items()
        if not key.startswith("stem_") and key not in ("small_images", "attention_stages", "zero_init_residual")
    }
    attention = partial(LocalAttention2d, fpn_channels, fpn_channels, **layer_options)
    pyramid = _pyramid(body, fpn_channels, attention if fpn == "attention" else None)
    detector = RetinaNet(
        Backbone(body, pyramid, fpn_channels, frozen_parts),
        num_classes,
        min_size=image_size,
        max_size=image_size,
        image_mean=list(mean),
        image_std=list(std),
        anchor_generator=anchors(scales, anchor_size),
    )
    if heads == "attention":
        _attention_heads(detector.head, fpn_channels, attention, head_std, head_shortcuts)
    else:
        _convolution_heads(detector.head, head_std, head_shortcuts)
    if batch_norm == "sync":
        detector = nn.SyncBatchNorm.convert_sync_batchnorm(detector)
    if batch_norm == "frozen":
        _freeze_norms(detector)
    return detector


def anchors(scales: int, smallest: float) -> AnchorGenerator:
    """The anchors of P3 to P7: sides smallest * 2^level * 2^(i / scales), in 3 ratios of the same area."""
    sizes = tuple(tuple(smallest * 2 ** (level + i / scales) for i in range(scales)) for level in range(LEVELS))
    return AnchorGenerator(sizes, (RATIOS,) * LEVELS)


def dense(detector: RetinaNet) -> nn.Sequential:
    """What the network computes of a batch (B, 3, H, W), before anchors are decoded: what FLOPs are counted of."""
    return nn.Sequential(detector.backbone, Maps(), detector.head)


class Maps(nn.Module):
    """The pyramid's maps without their names, as the heads take them."""

    def forward(self, maps: dict[str, Tensor]) -> list[Tensor]:
        return list(maps.values())


class Shortcut(nn.Sequential):
    """x -> x + the layers' output, of the same shape; the layers have the names that `nn.Sequential` gives them."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def _pyramid(body: model.ResNet, channels: int, attention) -> FeaturePyramidNetwork:
    """torchvision's pyramid over the stages 2 to 4 with P6 and P7 from P5; `attention` makes what replaces its 3x3."""
    widths = [
        next(m for m in reversed(list(stage.modules())) if isinstance(m, nn.BatchNorm2d)).num_features
        for stage in (body.layer2, body.layer3, body.layer4)
    ]
    pyramid = FeaturePyramidNetwork(widths, channels, LastLevelP6P7(channels, channels))
    if attention is not None:
        for i in range(len(pyramid.layer_blocks)):
            pyramid.layer_blocks[i] = attention()
        pyramid.extra_blocks.p6, pyramid.extra_blocks.p7 = attention(stride=2), attention(stride=2)
    return pyramid


def _attention_heads(head: RetinaNetHead, channels: int, attention, value_std: float, shortcuts: bool) -> None:
    """Put attention in place of each 3x3 convolution of both heads; a 1x1 convolution follows the predictor's."""
    for part, predictor in ((head.classification_head, "cls_logits"), (head.regression_head, "bbox_reg")):
        old = getattr(part, predictor)
        layers = [attention() for _ in range(len(part.conv) + 1)]
        for layer in layers:
            nn.init.normal_(layer.value.weight, std=value_std)
        new = nn.Conv2d(channels, old.out_channels, 1)
        nn.init.normal_(new.weight, std=0.01)
        with torch.no_grad():
            new.bias.copy_(old.bias)
        block = Shortcut if shortcuts else nn.Sequential
        part.conv = nn.Sequential(*(block(layer, nn.ReLU()) for layer in layers[:-1]))
        setattr(part, predictor, nn.Sequential(Shortcut(layers[-1]) if shortcuts else layers[-1], new))


def _convolution_heads(head: RetinaNetHead, std: float, shortcuts: bool) -> None:
    """Start the 3x3 convolutions of both heads but for the predictors', which stay torchvision's."""
    for part in (head.classification_head, head.regression_head):
        for layer in part.conv.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=std)
        if shortcuts:
            part.conv = nn.Sequential(*(Shortcut(*layer) for layer in part.conv))


def _freeze_norms(module: nn.Module) -> None:
    """Replace every batch norm by constants of the same names: weight, bias, running mean and variance."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, FrozenBatchNorm2d(child.num_features, eps=child.eps))
        else:
            _freeze_norms(child)


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r}: allowed are {', '.join(allowed)}")
