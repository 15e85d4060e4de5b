"""Local attention as operators of torch.library: `sasa::local_attention` and, of a fused projection, `.._packed`.

`.._pooled` has the average pool of a layer with stride 2 inside; it is of backend "cpu" alone.

Whatever the backend, torch.compile, torch.export, autocast and autograd see the same operator. The backend is chosen
inside it, from device, dtype and shape. Backward is an operator too, so that a compiler sees it as one call.

Shapes: as in sasa/kernels/interface.py; a fused projection is (B, P, N, D, H, W), P = 3 for query, key and value, or 2
for query and value.
"""

import functools
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from sasa.kernels import cpu, reference
from sasa.kernels.dispatch import choose_backend, module
from sasa.kernels.interface import (
    AttentionOptions,
    Targets,
    accumulate_dtype,
    differentiable_gradients,
    empty_like_map,
    empty_map,
    to_layout,
    without_autocast,
)


def split_packed(qkv: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    """The views query, key (None where P = 2) and value of a fused projection (B, P, N, D, H, W)."""
    parts = qkv.unbind(1)
    return parts[0], parts[1] if len(parts) == 3 else None, parts[-1]


def _forward(
    query: Tensor,
    key: Tensor | None,
    value: Tensor,
    rel_row: Tensor | None,
    rel_col: Tensor | None,
    options: AttentionOptions,
    backend: str,
) -> tuple[Tensor, Tensor]:
    chosen = module(choose_backend(query, options.kernel_size, backend))
    with without_autocast(query.device):
        out, lse = chosen.forward(query, key, value, rel_row, rel_col, options)
    return to_layout(out, query), lse.contiguous()


def _empty_outputs(query: Tensor) -> tuple[Tensor, Tensor]:
    b, n, _, h, w = query.shape
    return empty_like_map(query), query.new_empty((b, n, h, w), dtype=accumulate_dtype(query.dtype))


def _backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor | None,
    value: Tensor,
    rel_row: Tensor | None,
    rel_col: Tensor | None,
    out: Tensor,
    lse: Tensor,
    options: AttentionOptions,
    backend: str,
    into: Targets,
    into_embeddings: tuple[Tensor, Tensor],
) -> None:
    """Writes the gradients to `into` and, where there are embeddings, to `into_embeddings`."""
    chosen = module(choose_backend(query, options.kernel_size, backend))
    with without_autocast(query.device):
        gradients = chosen.backward(grad_out, query, key, value, rel_row, rel_col, out, lse, options, into)
    if rel_row is not None:
        for target, gradient in zip(into_embeddings, gradients[3:], strict=True):
            target.copy_(gradient)


def empty_embeddings(query: Tensor, *embeddings: Tensor | None) -> tuple[Tensor, ...]:
    """Uninitialised gradients; an empty one for an absent input, since an operator returns tensors only."""
    return tuple(
        query.new_empty(0) if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)
        for x in embeddings
    )


# Three maps ----------------------------------------------------------------------------------------------------------


@torch.library.custom_op("sasa::local_attention", mutates_args=())
def local_attention(
    query: Tensor,
    key: Optional[Tensor],
    value: Tensor,
    rel_row: Optional[Tensor],
    rel_col: Optional[Tensor],
    kernel_size: int,
    border: str,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """-> out (B, N, D, H, W), log-sum-exp (B, N, H, W)."""
    return _forward(query, key, value, rel_row, rel_col, AttentionOptions(kernel_size, border, scale), backend)


@local_attention.register_fake
def _(query, key, value, rel_row, rel_col, kernel_size, border, scale, backend):
    return _empty_outputs(query)


def _empty_gradients(query, key, value, rel_row, rel_col) -> tuple[Tensor, ...]:
    maps = (query.new_empty(0) if x is None else empty_like_map(query) for x in (query, key, value))
    return *maps, *empty_embeddings(query, rel_row, rel_col)


@torch.library.custom_op("sasa::local_attention_backward", mutates_args=())
def local_attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Optional[Tensor],
    value: Tensor,
    rel_row: Optional[Tensor],
    rel_col: Optional[Tensor],
    out: Tensor,
    lse: Tensor,
    kernel_size: int,
    border: str,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> gradients of query, key, value, rel_row, rel_col; an empty tensor where the input is None."""
    grads = _empty_gradients(query, key, value, rel_row, rel_col)
    into = (grads[0], None if key is None else grads[1], grads[2])
    options = AttentionOptions(kernel_size, border, scale)
    _backward(grad_out, query, key, value, rel_row, rel_col, out, lse, options, backend, into, grads[3:])
    return grads


@local_attention_backward.register_fake
def _(grad_out, query, key, value, rel_row, rel_col, out, lse, kernel_size, border, scale, backend):
    return _empty_gradients(query, key, value, rel_row, rel_col)


# A fused projection --------------------------------------------------------------------------------------------------


@torch.library.custom_op("sasa::local_attention_packed", mutates_args=())
def local_attention_packed(
    qkv: Tensor,
    rel_row: Optional[Tensor],
    rel_col: Optional[Tensor],
    kernel_size: int,
    border: str,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """-> out (B, N, D, H, W), log-sum-exp (B, N, H, W)."""
    options = AttentionOptions(kernel_size, border, scale)
    return _forward(*split_packed(qkv), rel_row, rel_col, options, backend)


@local_attention_packed.register_fake
def _(qkv, rel_row, rel_col, kernel_size, border, scale, backend):
    return _empty_outputs(qkv.select(1, 0))


@torch.library.custom_op("sasa::local_attention_packed_backward", mutates_args=())
def local_attention_packed_backward(
    grad_out: Tensor,
    qkv: Tensor,
    rel_row: Optional[Tensor],
    rel_col: Optional[Tensor],
    out: Tensor,
    lse: Tensor,
    kernel_size: int,
    border: str,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> gradients of qkv, rel_row, rel_col. That of qkv is one tensor whose slices are written: no concatenation."""
    grads = (empty_like_map(qkv), *empty_embeddings(qkv, rel_row, rel_col))
    into, options = split_packed(grads[0]), AttentionOptions(kernel_size, border, scale)
    _backward(grad_out, *split_packed(qkv), rel_row, rel_col, out, lse, options, backend, into, grads[1:])
    return grads


@local_attention_packed_backward.register_fake
def _(grad_out, qkv, rel_row, rel_col, out, lse, kernel_size, border, scale, backend):
    return empty_like_map(qkv), *empty_embeddings(qkv, rel_row, rel_col)


# A fused projection, and the average of each 2 x 2 block -------------------------------------------------------------


@torch.library.custom_op("sasa::local_attention_pooled", mutates_args=())
def local_attention_pooled(
    qkv: Tensor,
    rel_row: Optional[Tensor],
    rel_col: Optional[Tensor],
    kernel_size: int,
    border: str,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """-> averages (B, N, D, H/2, W/2), log-sum-exp (B, N, H, W); `functional.pools` says of which calls."""
    options = AttentionOptions(kernel_size, border, scale)
    return cpu.forward(*split_packed(qkv), rel_row, rel_col, options, pooled=True)


@local_attention_pooled.register_fake
def _(qkv, rel_row, rel_col, kernel_size, border, scale, backend):
    query = qkv.select(1, 0)
    size = (query.shape[-2] // 2, query.shape[-1] // 2)
    return empty_map(query, query.shape[1:3], size), _empty_outputs(query)[1]


@torch.library.custom_op("sasa::local_attention_pooled_backward", mutates_args=())
def local_attention_pooled_backward(
    grad_out: Tensor,
    qkv: Tensor,
    rel_row: Optional[Tensor],
    rel_col: Optional[Tensor],
    lse: Tensor,
    kernel_size: int,
    border: str,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> gradients of qkv, rel_row, rel_col, from that of the averages; the output itself is not needed."""
    grads = (empty_like_map(qkv), *empty_embeddings(qkv, rel_row, rel_col))
    into, options = split_packed(grads[0]), AttentionOptions(kernel_size, border, scale)
    _, _, _, *gradients = cpu.backward(
        grad_out, *split_packed(qkv), rel_row, rel_col, None, lse, options, into, pooled=True
    )
    if rel_row is not None:
        for target, gradient in zip(grads[1:], gradients, strict=True):
            target.copy_(gradient)
    return grads


@local_attention_pooled_backward.register_fake
def _(grad_out, qkv, rel_row, rel_col, lse, kernel_size, border, scale, backend):
    return empty_like_map(qkv), *empty_embeddings(qkv, rel_row, rel_col)


# Autograd ------------------------------------------------------------------------------------------------------------

_OPTIONS = 4  # arguments after the tensors: kernel_size, border, scale, backend


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:-_OPTIONS], *output)
    ctx.options = inputs[-_OPTIONS:]
    ctx.set_materialize_grads(False)


def _setup_pooled_context(ctx, inputs, output):
    _setup_context(ctx, inputs, output[1:])  # without out


def _gradients(operator, kept: int = 2):
    """The backward that register_autograd takes, by the operator that computes it.

    kept: outputs of the forward that it is given: out and lse, or with the pool inside lse alone.
    """
    pooled = kept == 1

    def backward(ctx, grad_out, grad_lse):
        saved = ctx.saved_tensors  # once: a second look would make checkpointing compute them again
        inputs = saved[:-kept]
        if grad_out is None:
            return (None,) * (len(inputs) + _OPTIONS)
        if torch.is_grad_enabled():  # create_graph=True
            again = functools.partial(by_reference, options=AttentionOptions(*ctx.options[:-1]), pooled=pooled)
            grads = differentiable_gradients(again, inputs, [grad_out])
        else:
            grads = operator(grad_out, *saved, *ctx.options)
            grads = [None if x is None else grad for x, grad in zip(inputs, grads, strict=True)]
        return *grads, *(None,) * _OPTIONS

    return backward


def by_reference(*inputs: Tensor | None, options: AttentionOptions, pooled: bool) -> list[Tensor]:
    """The reference's forward, with its K * K copies, of three maps or a fused projection, and the two tables."""
    maps = inputs[:3] if len(inputs) == 5 else split_packed(inputs[0])
    out, _ = reference.forward(*maps, *inputs[-2:], options)
    return [F.avg_pool2d(out.flatten(1, 2), 2).unflatten(1, out.shape[1:3]) if pooled else out]


local_attention.register_autograd(_gradients(local_attention_backward), setup_context=_setup_context)
local_attention_packed.register_autograd(_gradients(local_attention_packed_backward), setup_context=_setup_context)
local_attention_pooled.register_autograd(
    _gradients(local_attention_pooled_backward, kept=1), setup_context=_setup_pooled_context
)
