"""Attention of the stem: `attend`, which takes the fastest way there is, and the registered operator of its kernels.

The C++ kernel (cpu.py) serves CPU tensors, the Triton kernel (triton_stem.py) CUDA tensors, PyTorch everything else.

The operator `sasa::stem_attention` keeps the image and the weights between the passes and nothing else.

Shapes: B batch, C image channels, H x W image, N heads, D head width, S window side, M mixtures, P = S * S positions of
a window. Source: Ramachandran et al. 2019, section 3.3; the mathematics is in sasa/kernels/stem.py.
"""

import functools
import math
from typing import Optional

import torch
from torch import Tensor, nn

from sasa.kernels import cpu, triton_stem
from sasa.kernels.dispatch import choose_for
from sasa.kernels.functional import composite_serves
from sasa.kernels.interface import (
    CallKind,
    accumulate_dtype,
    differentiable_gradients,
    empty_like_map,
    empty_map,
)
from sasa.kernels.stem import block_attention, mixed_block_values, sliding_attention, to_blocks
from sasa.kernels.tracing import constant_when_compiled


def attend(
    x: Tensor, forms: Tensor, mixture: Tensor, value_weight: Tensor, window: str, border: str, backend: str
) -> Tensor:
    """Attention of each pixel over its window ("block" or "sliding"), with values mixed by the place in the window.

    x (B, C, H, W), forms (N, C, C), mixture p (P, M), value_weight (M, N * D, C) -> (B, N * D, H, W). A kernel serves
    where `kernel_for` names one, PyTorch everything else.
    """
    tensors = (x, forms, mixture, value_weight)
    kernel = _kernel_of(*tensors, backend)
    if kernel is None or composite_serves(backend, *tensors):
        return _composite(*tensors, window, border)
    wide = accumulate_dtype(x.dtype)
    tensors = (y.to(wide) for y in tensors)
    return _stem_attention(*tensors, window, border, None, kernel)[0].to(x.dtype)


def _composite(x: Tensor, forms: Tensor, mixture: Tensor, value_weight: Tensor, window: str, border: str) -> Tensor:
    """`attend` by PyTorch's own operations."""
    if window == "sliding":
        return sliding_attention(x, forms, mixture, value_weight, border)
    size = math.isqrt(mixture.shape[0])
    return block_attention(x, forms, mixed_block_values(x, mixture, value_weight), size, border)


def attend_normalise_pool(
    x: Tensor, forms: Tensor, mixture: Tensor, value_weight: Tensor, border: str, norm: nn.BatchNorm2d, backend: str
) -> Tensor:
    """Block attention, batch norm and the largest value of each block, where `kernel_for` names a kernel.

    The norm is a rising, falling or level line for each channel, so the largest value of a block after it is that of
    the largest, the smallest or, as a max pool takes the first of equal values, the first before it: the kernel finds
    it, and the map of H x W never exists. Where a weight is so small that rounding alone makes different values equal,
    theirs is the gradient of the largest still. In training the running statistics of `norm` are updated as its own
    forward does.

    Args:
        x, forms, mixture, value_weight, border, backend: as for `attend`; fp32 or fp64.
        norm: affine, with running statistics and a momentum.

    Returns:
        (B, N * D, ceil(H / S), ceil(W / S)).
    """
    signs = norm.weight.detach().sign().to(x.dtype)
    weights = [y.to(x.dtype) for y in (forms, mixture, value_weight)]  # the kernel reads them as numbers of one type
    kernel = _kernel_of(x, *weights, backend)
    chosen, _, moments = _stem_attention(x, *weights, "block", border, signs, kernel)
    mean, variance = moments.unbind()  # (N * D) in fp64, the biased variance, over the whole (B, H, W) map
    if norm.training:
        with torch.no_grad():
            count = x.numel() // x.shape[1]
            norm.num_batches_tracked += 1
            norm.running_mean.lerp_(mean.to(x.dtype), norm.momentum)
            norm.running_var.lerp_((variance * count / (count - 1)).to(x.dtype), norm.momentum)
    else:
        # Copies: a later batch in training changes these in place, and a backward may still need them.
        mean, variance = norm.running_mean.clone(), norm.running_var.clone()
    scale = norm.weight / (variance + norm.eps).sqrt()
    shift = norm.bias - mean * scale
    return chosen * scale.to(x.dtype)[:, None, None] + shift.to(x.dtype)[:, None, None]


@constant_when_compiled  # it asks whether there is a kernel here
def kernel_for(
    device: str, dtype: torch.dtype, channels: int, backend: str, side: int, mixtures: int, head_dim: int
) -> str | None:
    """The kernel that is the choice for a stem: "cpu", "triton", or None for PyTorch.

    Args:
        device, dtype, channels: of the image; a device's type.
        backend: "auto" or a name of `backends()`.
        side, mixtures, head_dim: S, M and D.

    Raises:
        ValueError: the named backend (or that of SASA_BACKEND) is unknown or not usable here.
    """
    wide = accumulate_dtype(dtype)
    if device == "cuda" or (device == "cpu" and backend == "triton"):  # on a CPU interpreted
        refused = triton_stem.unsupported(channels, side, mixtures, head_dim, wide)
        if refused or backend == "cpu":
            return None
        chosen = choose_for(CallKind(torch.device(device), wide, 1, 1), backend)
        return chosen if chosen == "triton" else None
    if device == "cpu" and channels == cpu.STEM_CHANNELS and dtype in cpu.DTYPES:
        return "cpu" if choose_for(CallKind(torch.device(device), dtype, 1, 1), backend) == "cpu" else None
    return None


def _kernel_of(x: Tensor, forms: Tensor, mixture: Tensor, value_weight: Tensor, backend: str) -> str | None:
    side, head_dim = math.isqrt(mixture.shape[0]), value_weight.shape[1] // forms.shape[0]
    return kernel_for(x.device.type, x.dtype, forms.shape[-1], backend, side, mixture.shape[1], head_dim)


def _empty_outputs(x: Tensor, mixture: Tensor, value_weight: Tensor, pooled: bool) -> tuple[Tensor, Tensor]:
    """The output, and the places of the largest values where it is pooled."""
    channels, side = (value_weight.shape[1],), math.isqrt(mixture.shape[0]) if pooled else 1
    size = tuple(-(-length // side) for length in x.shape[-2:])
    return empty_map(x, channels, size), empty_map(x, channels, size) if pooled else x.new_empty(0)


@torch.library.custom_op("sasa::stem_attention", mutates_args=())
def _stem_attention(
    x: Tensor,
    forms: Tensor,
    mixture: Tensor,
    value_weight: Tensor,
    window: str,
    border: str,
    signs: Optional[Tensor],
    served_by: str = "cpu",  # not `kernel`: Inductor calls operators by a function with an argument of that name
) -> tuple[Tensor, Tensor, Tensor]:
    """-> out, and with `signs` (N * D) the chosen values' places in their blocks, and moments; else two empty tensors.

    Of each block the value leaves whose product with the channel's sign (1, -1, 0) is the largest, the first of equals.
    """
    pooled = signs is not None
    weights, (out, index) = (forms, mixture, value_weight), _empty_outputs(x, mixture, value_weight, pooled)
    forward = triton_stem.forward if served_by == "triton" else cpu.stem_forward
    moments = forward(weights, x, window, border, out, *((index, signs.contiguous()) if pooled else ()))
    return out, index, x.new_empty(0, dtype=torch.float64) if moments is None else moments


@_stem_attention.register_fake
def _(x, forms, mixture, value_weight, window, border, signs, served_by="cpu"):
    pooled = signs is not None
    moments = x.new_empty((2, value_weight.shape[1]) if pooled else 0, dtype=torch.float64)
    return *_empty_outputs(x, mixture, value_weight, pooled), moments


@torch.library.custom_op("sasa::stem_attention_backward", mutates_args=())
def _stem_attention_backward(
    grad_out: Tensor,
    index: Tensor,
    slopes: Tensor,
    x: Tensor,
    forms: Tensor,
    mixture: Tensor,
    value_weight: Tensor,
    window: str,
    border: str,
    image_gradient: bool,
    pooled: bool,
    served_by: str = "cpu",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weights, grad_x = (forms, mixture, value_weight), empty_like_map(x) if image_gradient else None
    extra = (index, slopes.contiguous()) if pooled else ()
    backward = triton_stem.backward if served_by == "triton" else cpu.stem_backward
    grads = backward(weights, x, window, border, grad_out, grad_x, *extra)
    return x.new_empty(0) if grad_x is None else grad_x, *grads


@_stem_attention_backward.register_fake
def _(
    grad_out, index, slopes, x, forms, mixture, value_weight, window, border, image_gradient, pooled, served_by="cpu"
):
    grad_x = empty_like_map(x) if image_gradient else x.new_empty(0)
    return grad_x, *(torch.empty_like(y, memory_format=torch.contiguous_format) for y in (forms, mixture, value_weight))


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:4], *output[1:])
    ctx.mark_non_differentiable(output[1])
    window, border, signs, served_by = inputs[4:]
    ctx.options = (window, border, signs is not None, served_by)


def _backward(ctx, grad_out, grad_index, grad_moments):
    *inputs, index, moments = ctx.saved_tensors
    x, (window, border, pooled, served_by) = inputs[0], ctx.options
    if torch.is_grad_enabled():  # create_graph=True
        again = functools.partial(_by_composite, window=window, border=border, index=index if pooled else None)
        grads = differentiable_gradients(again, inputs, [grad_out, grad_moments] if pooled else [grad_out])
        return *grads, *(None,) * len(ctx.options)
    slopes = moments
    if pooled:  # of the mean, sum(o) / n, and of the variance, sum((o - mean)^2) / n
        of_mean, of_variance = grad_moments / (x.shape[0] * x.shape[2] * x.shape[3])
        slopes = torch.stack((of_mean - 2 * of_variance * moments[0], 2 * of_variance)).to(x.dtype)
    image_gradient = ctx.needs_input_grad[0]
    options = (window, border, image_gradient, pooled, served_by)
    grad_x, *grads = _stem_attention_backward(grad_out, index, slopes, *inputs, *options)
    return grad_x if image_gradient else None, *grads, *(None,) * len(ctx.options)


def _by_composite(*inputs: Tensor, window: str, border: str, index: Tensor | None) -> list[Tensor]:
    """What `_stem_attention` returns, by PyTorch's own operations: of blocks, the values at `index`, and moments."""
    values = _composite(*inputs, window, border)
    if index is None:
        return [values]
    moments = values.double().var((0, 2, 3), correction=0), values.double().mean((0, 2, 3))
    places = index.long().permute(0, 2, 3, 1)[:, :, :, None]  # (B, H/S, W/S, 1, N * D)
    blocks = to_blocks(values, math.isqrt(inputs[2].shape[0]))
    return [blocks.take_along_dim(places, 3).squeeze(3).permute(0, 3, 1, 2), torch.stack(moments[::-1])]


torch.library.register_autograd("sasa::stem_attention", _backward, setup_context=_setup_context)
