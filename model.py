"""ResNets whose 3x3 convolutions are local attention (Ramachandran et al. 2019, section 3.2), and their
convolution baselines.

image -> stem -> layer1..4, each a row of blocks -> global average pool -> fc. A `Bottleneck` is 1x1 -> batch norm ->
ReLU -> local attention or 3x3 convolution -> batch norm -> ReLU -> 1x1 -> batch norm, plus the shortcut. Any stage can
be attention or convolution; widths, depths and shortcuts are ResNet's (He et al. 2016).

Two forms: ImageNet (7x7 stride-2 convolution and 3x3 max pool, or block attention and 4x4 max pool) and small images
(3x3 stride-1 convolution, or sliding attention, no pool).
"""

import contextlib
import inspect
from collections import OrderedDict
from collections.abc import Collection, Iterable
from functools import partial

import torch
from torch import Tensor, nn

from attention import AttentionStem, LocalAttention2d
from sasa.backbone import CheckpointedBlock, StagedNetwork
from sasa.convert import STAGES, convert, load_torchvision  # noqa: F401 : parts of this module's interface
from sasa.initialise import he_weight, set_initialiser, zero_norm
from sasa.kernels.plain import is_plain, is_plain_norm, is_plain_pool
from sasa.kernels.tracing import CeilMaxPool2d, is_proxy

PLANES = (64, 128, 256, 512)  # channels of each stage's spatial layers
MIN_SIZE = 8  # pixels: the smallest image side that the networks are built for and tested with


class Bottleneck(CheckpointedBlock):
    """1x1, spatial layer, 1x1, plus the shortcut; (B, inplanes, H, W) -> (B, 4 * planes, ceil(H / s), ceil(W / s)).

    `attention` makes the spatial layer: called as attention(planes, planes, stride=stride); None is a 3x3 convolution.
    """

    expansion = 4

    def __init__(self, inplanes: int, planes: int, stride: int = 1, attention=None) -> None:
        super().__init__()
        width = planes * self.expansion
        self.conv1 = nn.Conv2d(inplanes, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.spatial = (
            conv3x3(planes, planes, stride) if attention is None else attention(planes, planes, stride=stride)
        )
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = shortcut(inplanes, width, stride)

    def compute(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.spatial(out)))
        out = self.bn3(self.conv3(out))
        return self.relu(out + identity)


class BasicBlock(CheckpointedBlock):
    """Two 3x3 convolutions plus the shortcut: (B, inplanes, H, W) -> (B, planes, ceil(H/stride), ceil(W/stride))."""

    expansion = 1

    def __init__(self, inplanes: int, planes: int, stride: int = 1, attention=None) -> None:
        super().__init__()
        if attention is not None:
            raise ValueError("a BasicBlock has no attention form: the Naive networks need attention_stages=()")
        self.conv1 = conv3x3(inplanes, planes, stride)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = conv3x3(planes, planes)
        self.bn2 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = shortcut(inplanes, planes, stride)

    def compute(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu(out + identity)


# The one table of variants: block, blocks in each stage, stages that are attention by default.
VARIANTS: dict[str, tuple[type[nn.Module], tuple[int, ...], tuple[int, ...]]] = {
    "ResNet26": (Bottleneck, (1, 2, 4, 1), STAGES),
    "ResNet38": (Bottleneck, (2, 3, 5, 2), STAGES),
    "ResNet50": (Bottleneck, (3, 4, 6, 3), STAGES),
    "NaiveResNet26": (BasicBlock, (1, 2, 4, 1), ()),
    "NaiveResNet38": (BasicBlock, (2, 3, 5, 2), ()),
}


class ResNet(StagedNetwork):
    """(B, in_chans, H, W) with H, W >= 8 -> logits (B, num_classes).

    Args:
        block: Bottleneck or BasicBlock.
        layers: blocks in each of the four stages.
        num_classes: classes of the classifier; 0 for none, the output is then the pooled features.
        stem: the attention stem instead of the convolution; its options are passed as `stem_*`.
        small_images: the CIFAR form instead of the ImageNet form.
        attention_stages: the stages (of 1 to 4) whose spatial layers are attention; () is the
            convolution baseline.
        in_chans: channels of the image.
        zero_init_residual: each residual branch starts at zero (the last batch norm's weight).
        **layer_options: of `LocalAttention2d`, for every attention stage, and with the prefix `stem_` of
            `AttentionStem`.

    Raises:
        ValueError: an unknown stage, an option's value out of its range, or an input of another shape.
        TypeError: an option that neither layer has.
    """

    def __init__(
        self,
        block: type[nn.Module],
        layers: Iterable[int],
        num_classes: int = 1000,
        stem: bool = False,
        *,
        small_images: bool = False,
        attention_stages: Collection[int] = STAGES,
        zero_init_residual: bool = False,
        in_chans: int = 3,
        **layer_options,
    ) -> None:
        super().__init__()
        attention_stages = tuple(attention_stages)
        unknown = [stage for stage in attention_stages if stage not in STAGES]
        if unknown:
            raise ValueError(f"attention_stages={attention_stages}: {unknown[0]!r} is not a stage of 1 to 4")
        stem_options = {k.removeprefix("stem_"): v for k, v in layer_options.items() if k.startswith("stem_")}
        layer_options = {k: v for k, v in layer_options.items() if not k.startswith("stem_")}
        _check_options(LocalAttention2d, layer_options, "")
        _check_options(AttentionStem, stem_options, "stem_")

        with torch.device("meta"):  # wrong values are refused even where no layer of that kind is built
            if not attention_stages:
                _check_fits_a_stage(layer_options)
            with _error_prefix("stem_"):
                AttentionStem(in_chans, 64, **stem_options)

        self.small_images, self.zero_init_residual = small_images, zero_init_residual
        self.stem = make_stem(64, stem, small_images, stem_options, in_chans)
        attention = partial(LocalAttention2d, **layer_options)
        inplanes = 64
        for stage, (planes, depth) in enumerate(zip(PLANES, layers, strict=True), start=1):
            blocks = []
            for i in range(depth):
                stride = 2 if i == 0 and stage > 1 else 1
                with _error_prefix(f"stage {stage}: "):
                    blocks.append(block(inplanes, planes, stride, attention if stage in attention_stages else None))
                inplanes = planes * block.expansion
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
        self.num_features = inplanes
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Identity()
        self.reset_classifier(num_classes)
        self._initialise()

    def _initialise(self) -> None:
        """He et al. 2015 for convolutions, fan-out; attention layers have initialised their own projections."""
        own = {
            m
            for layer in self.modules()
            if isinstance(layer, LocalAttention2d | AttentionStem)
            for m in layer.modules()
        }
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module not in own:
                set_initialiser(module, he_weight)
                module.reset_parameters()
        if self.zero_init_residual:
            for module in self.modules():
                if isinstance(module, Bottleneck | BasicBlock):
                    last = module.bn3 if isinstance(module, Bottleneck) else module.bn2
                    set_initialiser(last, zero_norm)
                    last.reset_parameters()

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new, freshly initialised `fc` for `num_classes` classes; 0: none, forward then gives pooled features.

        Args:
            global_pool: timm's choice of the pool; "avg", or None to keep it, is the one that there is.

        Raises:
            ValueError: a negative number, or another pool.
        """
        if num_classes < 0:
            raise ValueError(f"num_classes={num_classes}: must be at least 0")
        if global_pool not in (None, "avg"):
            raise ValueError(f"global_pool={global_pool!r}: allowed are None and 'avg'")
        like = next(self.parameters())
        self.num_classes = num_classes
        self.fc = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        if any((p.device, p.dtype) != (like.device, like.dtype) for p in self.fc.parameters()):
            self.fc.to(device=like.device, dtype=like.dtype)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, num_features, h, w), the map before the global pool."""
        self.check_image(x)
        x = self.stem(x)
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> logits (B, num_classes), or pooled features (B, num_features) without a classifier."""
        return self.forward_head(self.forward_features(x))

    def check_image(self, x: Tensor) -> None:
        """Checks x (B, in_chans, H, W); a trace of torch.fx has none to check.

        Raises:
            ValueError: another rank, number of channels, or a side that the stages shrink to nothing.
        """
        if is_proxy(x):
            return
        channels = getattr(self.stem[0], "in_channels", None)  # of the layer that is there, which may be another
        if x.dim() != 4 or channels not in (None, x.shape[1]):
            raise ValueError(f"the input must be (B, {channels}, H, W), got shape {tuple(x.shape)}")
        if min(x.shape[-2:]) < MIN_SIZE:
            raise ValueError(f"the image must be at least {MIN_SIZE}x{MIN_SIZE}, got {x.shape[-2]}x{x.shape[-1]}")


class PooledAttentionStem(nn.Sequential):
    """Attention stem of the ImageNet form: attention, batch norm, 4x4 max pool, ReLU.

    (B, 3, H, W) -> (B, C, ceil(H / 4), ceil(W / 4)). ReLU and pool commute, and the pool leaves a sixteenth to it. So
    do batch norm and pool, but for the sign of the norm's weight: where the pool's windows are the attention's blocks
    and the kernel can, it pools before the norm and the map of H x W never exists. Where that could be noticed (a
    hook, a replaced layer, another norm), all are called one by one.
    """

    def __init__(self, attention: AttentionStem) -> None:
        norm, pool = nn.BatchNorm2d(attention.out_channels), CeilMaxPool2d(4)
        super().__init__(attention, norm, pool, nn.ReLU(inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        if not self._fuses(x):
            return super().forward(x)
        attention, norm, _, relu = self
        return relu(attention.pooled(x, norm))

    def __getitem__(self, index: int | slice) -> nn.Module:
        """A layer; of a slice, as with `nn.Sequential`, a row of layers, which is no stem."""
        if isinstance(index, slice):
            return nn.Sequential(OrderedDict([*self._modules.items()][index]))
        return super().__getitem__(index)

    def _fuses(self, x: Tensor) -> bool:
        """Whether attention, norm and pool may be one, and nobody can tell; the ReLU is called in any case."""
        if len(self) != 4 or not is_plain(self[0], AttentionStem):  # in a trace of torch.fx no module is plain
            return False
        attention, norm, pool, _ = self
        if x.numel() <= attention.in_channels:
            return False  # training, batch norm refuses one value per channel, and leaves its statistics alone for none
        if not is_plain_norm(norm, attention.out_channels, x) or not is_plain_pool(pool, attention.block_size):
            return False
        return attention.can_pool(x)


def make_stem(
    out_channels: int, attention: bool, small_images: bool, options: dict, in_chans: int = 3
) -> nn.Sequential:
    """The layers before stage 1. ImageNet form: stride 4 in all; small images: stride 1."""
    if attention:
        if small_images:  # a mixture for each position of the window: with fewer, small images are seen too blurred
            positions = options.get("block_size", 4) ** 2
            options = {"window": "sliding", "num_mixtures": positions} | options
        layer = AttentionStem(in_chans, out_channels, **options)
        if not small_images:
            return PooledAttentionStem(layer)
    else:
        side, stride = (3, 1) if small_images else (7, 2)
        layer = nn.Conv2d(in_chans, out_channels, side, stride, padding=side // 2, bias=False)
    layers = [layer, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers) if small_images else nn.Sequential(*layers, nn.MaxPool2d(3, 2, padding=1))


def conv3x3(inplanes: int, planes: int, stride: int = 1) -> nn.Conv2d:
    """(B, inplanes, H, W) -> (B, planes, ceil(H / stride), ceil(W / stride)), without bias."""
    return nn.Conv2d(inplanes, planes, 3, stride, padding=1, bias=False)


def shortcut(inplanes: int, width: int, stride: int) -> nn.Sequential | None:
    """The projection of a block that changes the map's shape; None where the input passes as it is."""
    if stride == 1 and inplanes == width:
        return None
    return nn.Sequential(nn.Conv2d(inplanes, width, 1, stride, bias=False), nn.BatchNorm2d(width))


@contextlib.contextmanager
def _error_prefix(prefix: str):
    """A ValueError of the block's begins with `prefix`."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{prefix}{error}") from None


def _check_fits_a_stage(options: dict) -> None:
    """Checks that some stage can be attention with these options.

    Raises:
        ValueError: that of `LocalAttention2d`.
    """
    errors = []
    for planes in PLANES:
        try:
            LocalAttention2d(planes, planes, **options)
            return
        except ValueError as error:
            errors.append(error)
    raise errors[-1]


def _check_options(layer: type[nn.Module], options: dict, prefix: str) -> None:
    """Python refuses an unknown option only where a layer is built: a convolution baseline would swallow a typo."""
    parameters = set(inspect.signature(layer).parameters) - {"in_channels", "out_channels", "stride"}
    for name in options:
        if name not in parameters:
            allowed = ", ".join(prefix + p for p in sorted(parameters))
            raise TypeError(f"unknown option {prefix}{name}: allowed are {allowed}")


def build(name: str, num_classes: int = 1000, stem: bool = False, **options) -> ResNet:
    """The network of that name (a key of `VARIANTS`, any case) with the options of `ResNet`.

    Raises:
        ValueError: an unknown name, or as `ResNet` does.
    """
    names = {variant.lower(): variant for variant in VARIANTS}
    if name.lower() not in names:
        raise ValueError(f"model name {name!r}: allowed are {', '.join(VARIANTS)}")
    block, layers, stages = VARIANTS[names[name.lower()]]
    return ResNet(block, layers, num_classes, stem, **{"attention_stages": stages} | options)


def ResNet26(num_classes: int = 1000, stem: bool = False, **options) -> ResNet:
    """26 layers, blocks 1-2-4-1, local attention; options of `ResNet`."""
    return build("ResNet26", num_classes, stem, **options)


def ResNet38(num_classes: int = 1000, stem: bool = False, **options) -> ResNet:
    """38 layers, blocks 2-3-5-2, local attention; options of `ResNet`."""
    return build("ResNet38", num_classes, stem, **options)


def ResNet50(num_classes: int = 1000, stem: bool = False, **options) -> ResNet:
    """50 layers, blocks 3-4-6-3, local attention; options of `ResNet`."""
    return build("ResNet50", num_classes, stem, **options)


def NaiveResNet26(num_classes: int = 1000, stem: bool = False, **options) -> ResNet:
    """The block counts of ResNet26 with BasicBlock convolutions; options of `ResNet`."""
    return build("NaiveResNet26", num_classes, stem, **options)


def NaiveResNet38(num_classes: int = 1000, stem: bool = False, **options) -> ResNet:
    """The block counts of ResNet38 with BasicBlock convolutions; options of `ResNet`."""
    return build("NaiveResNet38", num_classes, stem, **options)
