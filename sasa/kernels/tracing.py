"""What the layers do differently while a tracer looks on: torch.fx, and torch.export with free sizes."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy


def constant_when_compiled(function: Callable) -> Callable:
    """A decorator: a compiler takes the function's result as it is, and does not trace how it is found.

    It leaves the mark that torch.compiler.assume_constant_result leaves. That function imports torch._dynamo, which
    makes the import of a layer a second longer, and with it Triton, which reads its environment then.
    """
    function._dynamo_marked_constant = True
    return function


def settled(size: int) -> int:
    """A size as a number where a compiler holds it as a symbol: what it makes is then for this size.

    A function of `constant_when_compiled` takes no symbol. With torch 2.6 a module's numbers are symbols too, where
    sizes may change (dynamic=True), and int() leaves them so.
    """
    return len(range(size))


def is_proxy(x: Tensor) -> bool:
    """Whether x only stands for a tensor, in a trace of torch.fx: it has no shape and no device to decide by."""
    return isinstance(x, Proxy)


def as_leaf(module: nn.Module, x: Proxy) -> Proxy:
    """The call of `module` as one node of the trace, whatever the tracer's own leaves are.

    Raises:
        ValueError: `module` is the root of the trace, which cannot be a node of it.
    """
    name = x.tracer.path_of_module(module)
    if not name:
        raise ValueError(f"torch.fx: a {type(module).__name__} is one node of a trace, so it cannot be its root")
    return x.tracer.create_proxy("call_module", name, (x,), {})


def has_free_size(x: Tensor) -> bool:
    """Whether height or width of x (.., H, W) is a symbol, as in torch.export with `Dim`."""
    return any(isinstance(size, torch.SymInt) for size in x.shape[-2:])


def fill_up(x: Tensor, side: int, value: float = 0.0) -> Tensor:
    """(.., H, W) padded after its last row and column up to whole multiples of `side`."""
    # Written as a strided convolution writes its size, so that both are seen to be equal.
    below, right = (((size - 1) // side + 1) * side - size for size in x.shape[-2:])
    return F.pad(x, (0, right, 0, below), value=value)


def split_sides(x: Tensor, size: int) -> Tensor:
    """(B, C, H, W) -> (B, C, ceil(H / S), S, ceil(W / S), S), what a last block lacks filled up with zeros."""
    if not has_free_size(x):
        x = F.pad(x, (0, -x.shape[-1] % size, 0, -x.shape[-2] % size))
        return x.unflatten(-1, (-1, size)).unflatten(-3, (-1, size))
    # Free sizes are gathered by index: a pad, and a view that splits a side, compare sizes, which ties them down.
    height, width = x.shape[-2:]
    rows, cols = (
        torch.arange((side + size - 1) // size, device=x.device)[:, None] * size + torch.arange(size, device=x.device)
        for side in (height, width)
    )  # (H/S, S), (W/S, S)
    outside = (rows >= height)[..., None, None] | (cols >= width)
    x = x[:, :, rows.clamp(max=height - 1)][..., cols.clamp(max=width - 1)]
    return x.masked_fill(outside, 0.0)


def join_sides(x: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `split_sides`: (B, C, ceil(H / S), S, ceil(W / S), S) -> (B, C, H, W)."""
    size = x.shape[-1]
    if not any(isinstance(side, torch.SymInt) for side in (height, width)):
        return x.flatten(4, 5).flatten(2, 3)[:, :, :height, :width]
    rows, cols = (torch.arange(side, device=x.device) for side in (height, width))
    return x[:, :, rows // size, rows % size][..., cols // size, cols % size]


class CeilAvgPool2d(nn.AvgPool2d):
    """Average of side x side blocks; a ragged last one averages the pixels that it has.

    (B, C, H, W) -> (B, C, ceil(H / side), ceil(W / side)). PyTorch's own rule for the last block compares sizes, which
    ties down an exported height and width: those are filled up with zeros, and divided by the share of the map.
    """

    def __init__(self, side: int) -> None:
        super().__init__(side, side, ceil_mode=True, count_include_pad=False)

    def forward(self, x: Tensor) -> Tensor:
        if is_proxy(x):
            return as_leaf(self, x)
        side = self.kernel_size
        if not has_free_size(x):
            return super().forward(x)
        share = F.avg_pool2d(fill_up(x.new_ones(1, 1, *x.shape[-2:]), side), side)
        return F.avg_pool2d(fill_up(x, side), side) / share


class CeilMaxPool2d(nn.MaxPool2d):
    """Largest value of side x side blocks, the ragged last ones included; see `CeilAvgPool2d`."""

    def __init__(self, side: int) -> None:
        super().__init__(side, side, ceil_mode=True)

    def forward(self, x: Tensor) -> Tensor:
        if is_proxy(x):
            return as_leaf(self, x)
        if not has_free_size(x):
            return super().forward(x)
        return F.max_pool2d(fill_up(x, self.kernel_size, float("-inf")), self.kernel_size)
