"""What every backend is given, what it returns, and what backends share: precision and memory layout.

A backend is a module with the four functions of `Backend`. What they take and return means the same in each, so forward
and backward can be of two backends.

Shapes: B batch, N heads, D head width, H x W map, K window side; query, key and value (B, N, D, H, W), rel_row and
rel_col (N, D/2, K).
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

BORDERS = ("mask", "zero")
LARGEST_SCALE = torch.finfo(torch.float32).max  # of logits: kernels take it as a float32


class AttentionOptions(NamedTuple):
    """The numbers and words of a call, as `sasa.kernels.local_attention` describes them."""

    kernel_size: int
    border: str = "mask"
    scale: float = 1.0


class CallKind(NamedTuple):
    """All that the choice of a backend may depend on."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    kernel_size: int

    @classmethod
    def of(cls, query: Tensor, kernel_size: int) -> "CallKind":
        """That of a call with this query (B, N, D, H, W)."""
        return cls(query.device, query.dtype, query.shape[2], kernel_size)


Gradients = tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor | None]
Targets = tuple[Tensor, Tensor | None, Tensor]


class Backend(Protocol):
    """The functions of a backend's module. key, or rel_row and rel_col, may be None, and so are their gradients."""

    def unusable(self) -> str | None:
        """Why the backend cannot run on this machine, or None."""

    def unsupported(self, kind: CallKind) -> str | None:
        """Why the backend cannot take calls of this kind, or None."""

    def forward(
        self,
        query: Tensor,
        key: Tensor | None,
        value: Tensor,
        rel_row: Tensor | None,
        rel_col: Tensor | None,
        options: AttentionOptions,
    ) -> tuple[Tensor, Tensor]:
        """Attention of each pixel over its window.

        Returns:
            out (B, N, D, H, W) in query's dtype, and lse (B, N, H, W) in the accumulation dtype: the natural logarithm
            of the sum of the exponentials of a window's logits.
        """

    def backward(
        self,
        grad_out: Tensor,
        query: Tensor,
        key: Tensor | None,
        value: Tensor,
        rel_row: Tensor | None,
        rel_col: Tensor | None,
        out: Tensor,
        lse: Tensor,
        options: AttentionOptions,
        into: Targets | None = None,
    ) -> Gradients:
        """Gradients of query, key, value, rel_row and rel_col; the first three are in `into` where that is given.

        Args:
            grad_out, out: (B, N, D, H, W).
            lse: (B, N, H, W).
            into: tensors of any strides for the gradients of query, key and value; new ones are made without it.
        """


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits and softmax: fp64 stays, everything narrower is computed in fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype of autocast where it is on for the device, else None; of the meta device PyTorch raises."""
    if device.type != "meta" and torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return None


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """A context without autocast, which would narrow the products behind the fp32 logits."""
    if autocast_dtype(device) is None:
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def channels_innermost(x: Tensor) -> bool:
    """Whether channels lie side by side in memory, as with channels_last: x (.., C, H, W)."""
    return x.stride(-3) == 1 and x.stride(-1) != 1


def empty_map(like: Tensor, channels: tuple[int, ...], size: tuple[int, int]) -> Tensor:
    """An uninitialised (B, *channels, *size) map with the batch, dtype, device and memory order of `like`.

    Channels are innermost in memory where they are in `like` (B, .., C, H, W), as with channels_last; else the map is
    contiguous.
    """
    if channels_innermost(like):
        return empty_inner_map(like, channels, size)
    return like.new_empty((like.shape[0], *channels, *size))


def empty_inner_map(like: Tensor, channels: tuple[int, ...], size: tuple[int, int]) -> Tensor:
    """`empty_map` with channels innermost in memory, whatever those of `like` are."""
    strides, step = [], 1
    for count in reversed(channels):
        strides.insert(0, step)
        step *= count
    height, width = size
    # By its strides, not as a permuted view, which autograd would not let a user change in place.
    shape = (like.shape[0], *channels, height, width)
    return like.new_empty_strided(shape, (height * width * step, *strides, width * step, step))


def empty_like_map(like: Tensor) -> Tensor:
    """`empty_map` of the shape of `like`: (B, N, D, H, W), or (B, P, N, D, H, W) for a fused projection."""
    return empty_map(like, like.shape[1:-2], like.shape[-2:])


def to_layout(x: Tensor, like: Tensor) -> Tensor:
    """`x` in the memory layout of `empty_like_map(like)`: the strides an operator promises must be the real ones."""
    target = empty_like_map(like)
    return x if x.stride() == target.stride() else target.copy_(x)


def differentiable_gradients(
    function: Callable, inputs: Sequence[Tensor | None], directions: list[Tensor]
) -> list[Tensor | None]:
    """Gradients of the tensors function(*inputs) that can be differentiated again; None where an input needs none.

    Each is with respect to its input alone, not to another that is the same tensor or was computed from it: autograd
    adds those up itself. All of it is computed without autocast.

    Args:
        function: of `inputs`, in PyTorch's own operations; returns a list of tensors.
        inputs: tensors, or None.
        directions: the gradients of function's results.
    """
    inputs = [x.view_as(x) if x is not None and x.requires_grad else x for x in inputs]
    wanted = [x for x in inputs if x is not None and x.requires_grad]
    with without_autocast(directions[0].device):
        grads = iter(torch.autograd.grad(function(*inputs), wanted, directions, create_graph=True))
    return [next(grads) if x is not None and x.requires_grad else None for x in inputs]


def deliver(maps: tuple[Tensor | None, ...], into: Targets | None) -> tuple[Tensor | None, ...]:
    """`maps`, or the tensors of `into` with their values where those are given."""
    if into is None:
        return maps
    return tuple(None if x is None else target.copy_(x) for x, target in zip(maps, into, strict=True))
