"""FLOPs and parameters of a network, counted on the real modules without any arithmetic.

Forward hooks give every module the shapes that a forward of one image really gives it, on a copy on the meta device.
FLOPs follow from an operator's equation (`RULE`, `FLOPS`), not from what a backend executes, so they are the same for
every backend. The paper (Ramachandran et al. 2019) names no counting rule; `RULE` is the one that fits its tables.
"""

import copy
import warnings
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from attention import AttentionStem, LocalAttention2d
from model import BasicBlock, Bottleneck, ResNet
from sasa.kernels.flops import attention_flops, stem_flops

RULE = (
    "FLOPs of one image's forward, each operator by its equation; a multiply-add is 2:",
    "  convolution, linear   2 a weight and output position, 1 a bias; taps on the padding count",
    "  projections           2 a weight and pixel, dense, at the resolution before the layer's pool",
    "  local attention       per pixel and each of all K * K neighbours, those outside the map too: r added to k 1 a",
    "                        channel, one dot with q 2 a channel, weighted sum of v 2 a channel, softmax 5 a head;",
    "                        with q.k alone or q.r alone there is nothing to add; a scale other than 1: 1 a head",
    "  absolute position     1 a channel and pixel of the layer's input (the sinusoids are constants)",
    "  attention stem        the same over the S * S pixels of a block, without r; each of the m value matrices is",
    "                        applied to each pixel, then mixed: 2 a matrix and channel (for each neighbour in sliding",
    "                        windows, where a pixel has one value for each; the mixing weights p are constants)",
    "  batch norm 2, ReLU 1, residual add 1 an element; pools 1 an element of each window",
    "Parameters: all of them, batch norms and classifier included; running statistics are not parameters.",
)


@dataclass(frozen=True)
class Flops:
    """FLOPs of one image's forward by kind of operator, by the convention of `RULE`."""

    by_kind: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.by_kind.values())


def count_parameters(model: nn.Module) -> int:
    """The elements of all parameters, frozen ones too, shared ones once; buffers are not parameters."""
    return sum(p.numel() for p in model.parameters())


def count_flops(
    model: nn.Module, image_size: int | tuple[int, int], in_channels: int = 3, rules: dict | None = None
) -> Flops:
    """FLOPs of the model's forward of one image of image_size (H = W, or (H, W)) pixels, by the convention of `RULE`.

    `model` lives on any device and stays as it is: a copy of its modules on the meta device, without its data and
    hooks, takes the forward, in evaluation mode. Wrappers (DDP, torch.compile) must be taken off before. `rules` are
    those of further types of modules, in the form of `FLOPS`.

    Raises:
        TypeError: a module of a type that neither `FLOPS` nor `rules` has a rule for.
        ValueError: an image size that the model does not take.
    """
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    model = _skeleton(model).eval()
    kinds: Counter[str] = Counter()
    rules = FLOPS | (rules or {})

    def count(module: nn.Module, inputs: tuple, out: Tensor) -> None:
        kinds.update(_rule(module, rules)(module, inputs[0], out))

    attention = [m for m in model.modules() if isinstance(m, LocalAttention2d | AttentionStem)]
    projections = {child for layer in attention for child in layer.children() if isinstance(child, nn.Conv2d)}
    for module in model.modules():
        if module not in projections:  # counted with their layer, which may compute them in one product
            module.register_forward_hook(count)
        if isinstance(module, _BatchNorm):  # keeps the shape, and takes most of a forward on meta
            module.forward = lambda x: x
    like = next(model.parameters(), torch.empty(0))
    with torch.no_grad(), warnings.catch_warnings():
        # A remark on the memory of even convolutions (Table 7's "conv"): nothing is computed here.
        warnings.filterwarnings("ignore", message="Using padding='same' with even kernel lengths")
        model(torch.empty(1, in_channels, height, width, dtype=like.dtype, device="meta"))
    return Flops(dict(kinds))


def _skeleton(model: nn.Module) -> nn.Module:
    """A copy of the modules on the meta device, without hooks: deepcopy takes what its memo already holds."""
    memo = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False) for p in model.parameters()}
    memo |= {id(b): torch.empty_like(b, device="meta") for b in model.buffers()}
    for module in model.modules():
        memo |= {id(v): type(v)() for k, v in vars(module).items() if "_hooks" in k and isinstance(v, dict)}
    return copy.deepcopy(model, memo)


def _local_attention(layer: LocalAttention2d, x: Tensor, out: Tensor) -> dict[str, int]:
    pixels = x[:, 0].numel()  # of the input: the layer's pool comes after
    pairs, relative = pixels * layer.kernel_size**2, layer.position == "relative"
    weights = sum(p.weight.numel() for p in (layer.query, layer.key, layer.value) if p is not None)
    return {
        "position": x.numel() if layer.position == "absolute" else 0,
        "projection": 2 * weights * pixels,
        **attention_flops(pairs, layer.out_channels, layer.num_heads, layer.content, relative, layer.scale != 1),
    }


def _attention_stem(layer: AttentionStem, x: Tensor, out: Tensor) -> dict[str, int]:
    pixels = x[:, 0].numel()
    mixed = layer.values == "mixture"
    sizes = (pixels, layer.block_size, layer.in_channels, layer.out_channels, layer.num_heads)
    found = stem_flops(*sizes, layer.num_mixtures if mixed else 1, mixed, layer.window == "sliding")
    weights = sum(p.weight.numel() for p in (layer.query, layer.key, layer.value))  # those of "conv" are wider
    return found | {"projection": 2 * weights * pixels}


# The FLOPs of one call of a module m on x; of a container: what its forward adds to that of its parts.
FLOPS = {
    nn.Conv2d: lambda m, x, out: {"convolution": out.numel() * (2 * m.weight[0].numel() + (m.bias is not None))},
    nn.Linear: lambda m, x, out: {"linear": out.numel() * (2 * m.in_features + (m.bias is not None))},
    LocalAttention2d: _local_attention,
    AttentionStem: _attention_stem,
    _BatchNorm: lambda m, x, out: {"batch norm": 2 * out.numel()},
    nn.ReLU: lambda m, x, out: {"relu": out.numel()},
    nn.MaxPool2d: lambda m, x, out: {"pool": out.numel() * m.kernel_size**2},
    nn.AvgPool2d: lambda m, x, out: {"pool": out.numel() * m.kernel_size**2},
    nn.AdaptiveAvgPool2d: lambda m, x, out: {"pool": x.numel()},
    **dict.fromkeys((Bottleneck, BasicBlock), lambda m, x, out: {"add": out.numel()}),
    **dict.fromkeys((ResNet, nn.Sequential, nn.Identity), lambda m, x, out: {}),
}


def _rule(module: nn.Module, rules: dict):
    for kind in type(module).__mro__:
        if kind in rules:
            return rules[kind]
    raise TypeError(f"no FLOPs rule for {type(module).__name__}: it must be in sasa.analysis.flops.FLOPS")
