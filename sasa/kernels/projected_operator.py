"""Local attention of a layer's input, its projections inside the C++ kernel: the operator `sasa::projected_attention`.

The kernel makes query, key and value row by row, in the order that it reads them in, while they are in the cache.
Without gradients they are never written; for a backward the kernel keeps them in its own order. The gradients of the
input and of the weight are PyTorch's, from that of the projection.

Shapes: B batch, C channels of the input, N heads, D head width, H x W map, K window side; P = 3 projections (query,
key, value; 2 without key).
"""

import functools
from typing import Optional

import torch
from torch import Tensor

from sasa.kernels import cpu
from sasa.kernels.functional import composite_serves, kernel_serves
from sasa.kernels.interface import AttentionOptions, differentiable_gradients, empty_inner_map, without_autocast
from sasa.kernels.operators import by_reference, empty_embeddings
from sasa.kernels.projection import project, projection_gradients


def serves(
    x: Tensor,
    weight: Tensor,
    rel_row: Tensor | None,
    rel_col: Tensor | None,
    heads: tuple[int, int],
    kernel_size: int,
    backend: str,
) -> bool:
    """Whether `attend` serves: fp32 or fp64 on a CPU by the C++ kernel, of a map with channels innermost in memory.

    Not what is compiled or traced: a trace keeps the answer for maps of other sizes, and a compiler takes the steps.

    Args:
        x, rel_row, rel_col: as for `attend`.
        weight: of any shape.
        heads, kernel_size: (N, D) and K.
        backend: "auto" or a name of `backends()`.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or not x.numel():
        return False
    if composite_serves(backend, x, weight, rel_row, rel_col) or not kernel_serves(x, heads[1], kernel_size, backend):
        return False
    tables, wanted = [y for y in (rel_row, rel_col) if y is not None], (heads[0], heads[1] // 2, kernel_size)
    if len(tables) == 1 or any(y.shape != wanted for y in tables):
        return False  # the steps refuse it, as they do what follows
    if any(y.dtype != x.dtype or y.device != x.device for y in (weight, *tables)):
        return False
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def attend(
    x: Tensor,
    weight: Tensor,
    rel_row: Tensor | None,
    rel_col: Tensor | None,
    heads: tuple[int, int, int],
    options: AttentionOptions,
    pooled: bool = False,
) -> Tensor:
    """Attention of x's projections; only where `serves` says so.

    Args:
        x: (B, C, H, W).
        weight: (P * N * D, C, 1, 1), of the P projections one after the other.
        rel_row, rel_col: (N, D/2, K), or both None.
        heads: P, N and D.
        options: see `functional.local_attention`.
        pooled: the averages of the 2 x 2 blocks instead; H and W are even.

    Returns:
        (B, N, D, H, W) or with `pooled` (B, N, D, H/2, W/2), channels innermost in memory.
    """
    tensors = (x, weight, rel_row, rel_col)
    needed = torch.is_grad_enabled() and any(y is not None and y.requires_grad for y in tensors)
    projection = _Projection.apply(x, weight) if needed else None
    return _projected_attention(projection, *tensors, *heads[:2], *options, pooled)[0]


class _Projection(torch.autograd.Function):
    """Stands for the projection (B, P * N * D, H, W), which is not computed here: a map without memory of its own.

    Its gradient is what attention gives it, and becomes those of input and weight here: in a node of autograd of its
    own, since attention's node holds the maps that it has kept until it is done.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x.new_zeros(1).expand(x.shape[0], weight.shape[0], *x.shape[2:])

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True
            return tuple(differentiable_gradients(lambda *inputs: [project(*inputs)], (x, weight), [grad]))
        return projection_gradients(grad, x, weight, ctx.needs_input_grad)


@torch.library.custom_op("sasa::projected_attention", mutates_args=())
def _projected_attention(
    projection: Optional[Tensor],
    x: Tensor,
    weight: Tensor,
    rel_row: Optional[Tensor],
    rel_col: Optional[Tensor],
    parts: int,
    num_heads: int,
    kernel_size: int,
    border: str,
    scale: float,
    pooled: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> out, log-sum-exp (B, N, H, W) and the maps in the kernel's order; the last two empty without `projection`.

    `projection` is never read: the gradient of x and weight goes by it (`_Projection`).
    """
    options, keep = AttentionOptions(kernel_size, border, scale), projection is not None
    weight = weight.flatten(1).unflatten(0, (parts, -1))
    return cpu.project_and_attend(x, weight, rel_row, rel_col, num_heads, options, pooled, keep)


@_projected_attention.register_fake
def _(projection, x, weight, rel_row, rel_col, parts, num_heads, kernel_size, border, scale, pooled):
    return cpu.empty_projected(x, weight.shape[0] // parts, num_heads, parts, pooled, projection is not None)


@torch.library.custom_op("sasa::projected_attention_backward", mutates_args=())
def _projected_attention_backward(
    grad_out: Tensor,
    kept: Tensor,
    rel_row: Optional[Tensor],
    rel_col: Optional[Tensor],
    out: Optional[Tensor],
    lse: Tensor,
    parts: int,
    kernel_size: int,
    border: str,
    scale: float,
    pooled: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> gradients of the projection (B, P, N, D, H, W), rel_row and rel_col; an empty tensor where there is none."""
    options = AttentionOptions(kernel_size, border, scale)
    grad, *tables = cpu.projected_backward(grad_out, kept, rel_row, rel_col, out, lse, parts, options, pooled)
    return grad, *(kept.new_empty(0) if x is None else x for x in tables)


@_projected_attention_backward.register_fake
def _(grad_out, kept, rel_row, rel_col, out, lse, parts, kernel_size, border, scale, pooled):
    grad = empty_inner_map(grad_out, (parts, *grad_out.shape[1:3]), lse.shape[2:])
    return grad, *empty_embeddings(kept, rel_row, rel_col)


def _setup_context(ctx, inputs, output):
    projection, *tensors, parts, num_heads, kernel_size, border, scale, ctx.pooled = inputs
    out, lse, kept = output
    ctx.mark_non_differentiable(lse, kept)
    ctx.set_materialize_grads(False)  # or zeros would be made for what is kept
    ctx.save_for_backward(*tensors, None if ctx.pooled else out, lse, kept)  # pooled: see csrc/pairs.h
    ctx.options, ctx.is_kept = (kernel_size, border, scale), projection is not None
    ctx.heads = (parts, num_heads, tensors[1].shape[0] // (parts * num_heads))


def _backward(ctx, grad_out, grad_lse, grad_kept):
    *inputs, out, lse, kept = ctx.saved_tensors  # once: a second look would make checkpointing compute them again
    x, weight, rel_row, rel_col = inputs
    if not ctx.is_kept:
        raise RuntimeError("sasa::projected_attention was called without a projection: it has no backward")
    if grad_out is None:
        return (None,) * 11
    if torch.is_grad_enabled():  # create_graph=True
        again = functools.partial(by_reference, options=AttentionOptions(*ctx.options), pooled=ctx.pooled)
        with without_autocast(x.device):
            maps = project(x, weight).unflatten(1, ctx.heads)
        inputs = (maps, rel_row, rel_col)
        grad, grad_row, grad_col = differentiable_gradients(again, inputs, [grad_out])
    else:
        grad, grad_row, grad_col = _projected_attention_backward(
            grad_out, kept, rel_row, rel_col, out, lse, ctx.heads[0], *ctx.options, ctx.pooled
        )
    if grad is not None:  # reshape, as elsewhere here: batched gradients (vectorize=True) have no flatten
        grad = grad.reshape(grad.shape[0], -1, *grad.shape[4:])
    tables = (None, None) if rel_row is None else (grad_row, grad_col)
    return grad, None, None, *tables, *(None,) * 6


torch.library.register_autograd("sasa::projected_attention", _backward, setup_context=_setup_context)
