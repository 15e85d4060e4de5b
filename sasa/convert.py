"""Networks of others: local attention in the bottlenecks of a torchvision or timm ResNet, and torchvision's weights.

Both work on module and state-dict names alone, so neither package needs to be installed.
"""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from attention import LocalAttention2d

STAGES = (1, 2, 3, 4)


def convert(network: nn.Module, stages: Collection[int] = STAGES, **layer_options) -> nn.Module:
    """Makes the 3x3 convolutions of a ResNet's bottlenecks local attention, in place; all other weights are kept.

    Args:
        network: a ResNet of torchvision or timm: `layer1` to `layer4` of bottlenecks whose 3x3 convolution is `conv2`.
        stages: which of the layers, of 1 to 4.
        **layer_options: of `LocalAttention2d`; the new layers have its initialisation.

    Returns:
        `network` itself.

    Raises:
        ValueError: an unknown stage, a network without bottlenecks, a convolution that is grouped, dilated or of
            another form (named), or options that do not fit. The network is then unchanged.
    """
    stages = tuple(stages)
    unknown = [stage for stage in stages if stage not in STAGES]
    if unknown:
        raise ValueError(f"stages={stages}: {unknown[0]!r} is not a stage of 1 to 4")
    layers = {}
    for stage in stages:
        blocks = getattr(network, f"layer{stage}", None)
        if blocks is None:
            raise ValueError(f"{type(network).__name__} has no layer{stage}: convert takes ResNets")
        for i, block in enumerate(blocks):
            name = f"layer{stage}.{i}.conv2"
            convolution = getattr(block, "conv2", None)
            if convolution is None or not hasattr(block, "conv3"):
                raise ValueError(
                    f"layer{stage}.{i} is a {type(block).__name__}, no bottleneck with a conv2 and a conv3"
                )
            layers[name] = _attention_like(name, convolution, layer_options)
    for name, layer in layers.items():
        network.set_submodule(name, layer)
    return network


def _attention_like(name: str, convolution: nn.Module, options: dict) -> LocalAttention2d:
    if not isinstance(convolution, nn.Conv2d):
        raise ValueError(f"{name} is a {type(convolution).__name__}, not a convolution")
    for what, got, wanted in (
        ("groups", convolution.groups, 1),
        ("dilation", convolution.dilation, (1, 1)),
        ("kernel_size", convolution.kernel_size, (3, 3)),
    ):
        if got != wanted:
            raise ValueError(f"{name}: {what}={got}, convert takes {wanted} only")
    stride, across = convolution.stride
    if stride != across:
        raise ValueError(f"{name}: stride={convolution.stride}, convert takes equal strides only")
    try:
        layer = LocalAttention2d(convolution.in_channels, convolution.out_channels, stride=stride, **options)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    like = convolution.weight
    return layer.to(device=like.device, dtype=like.dtype).train(convolution.training)


def load_torchvision(network: nn.Module, state_dict: Mapping[str, Tensor]) -> nn.Module:
    """Loads torchvision's weights of a bottleneck ResNet into our convolution baseline of the same depth, in place.

    Args:
        network: such as model.ResNet50(attention_stages=()), in the ImageNet form.
        state_dict: such as torchvision.models.resnet50(weights="DEFAULT").state_dict().

    Returns:
        `network` itself; in eval mode its outputs equal torchvision's.

    Raises:
        ValueError: a network with attention, or weights of another shape or number; the network is then unchanged.
    """
    if any(isinstance(module, LocalAttention2d) for module in network.modules()):
        raise ValueError("torchvision's ResNets have no attention: build the network with attention_stages=()")
    names = {"conv1": "stem.0", "bn1": "stem.1"}

    def ours(key: str) -> str:
        first, _, rest = key.partition(".")
        if first in names:
            return f"{names[first]}.{rest}"
        return key.replace(".conv2.", ".spatial.") if first.startswith("layer") else key

    renamed, wanted = {ours(key): value for key, value in state_dict.items()}, network.state_dict()
    differing = sorted(renamed.keys() ^ wanted.keys()) or sorted(
        key for key, value in wanted.items() if value.shape != renamed[key].shape
    )
    if differing:
        raise ValueError(f"weights of another network: {len(differing)} entries differ, the first is {differing[0]}")
    with torch.no_grad():
        network.load_state_dict(renamed)
    return network
