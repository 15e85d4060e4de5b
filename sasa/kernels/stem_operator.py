"""Attention of the stem: the one way in, `attend`, and the registered operator of its C++ kernel.

The operator `sasa::stem_attention` keeps the image and the weights between the passes and nothing else.

Shapes: B batch, C image channels, H x W image, N heads, D head width, S window side, M mixtures, P = S * S positions of
a window. Source: Ramachandran et al. 2019, section 3.3; the mathematics is in kernels/stem.py.
"""

import math

import torch
from torch import Tensor

from sasa.kernels import cpu
from sasa.kernels.dispatch import choose_backend
from sasa.kernels.interface import accumulate_dtype, empty_like_map, empty_map
from sasa.kernels.stem import block_attention, mixed_block_values, sliding_attention


def attend(
    x: Tensor, forms: Tensor, mixture: Tensor, value_weight: Tensor, window: str, border: str, backend: str
) -> Tensor:
    """Attention of each pixel over its window ("block" or "sliding"), with values mixed by the place in the window.

    x (B, C, H, W), forms (N, C, C), mixture p (P, M), value_weight (M, N * D, C) -> (B, N * D, H, W). The C++ kernel
    serves 3 channels on a CPU where backend "cpu" is the choice, PyTorch everything else.
    """
    if kernel_serves(x.device.type, x.dtype, x.shape[1], backend):
        wide = accumulate_dtype(x.dtype)
        tensors = (y.to(wide) for y in (x, forms, mixture, value_weight))
        return _stem_attention(*tensors, window, border, x.requires_grad, False)[0].to(x.dtype)
    if window == "sliding":
        return sliding_attention(x, forms, mixture, value_weight, border)
    size = math.isqrt(mixture.shape[0])
    return block_attention(x, forms, mixed_block_values(x, mixture, value_weight), size, border)


def attend_and_pool(
    x: Tensor, forms: Tensor, mixture: Tensor, value_weight: Tensor, border: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Block attention of which only the largest value of each block and channel leaves the kernel (`kernel_serves`).

    Arguments as for `attend`, fp32 or fp64 -> largest values (B, N * D, ceil(H / S), ceil(W / S)), mean and biased
    variance of each channel over the whole (B, H, W) map, (N * D) each in fp64.
    """
    pooled, _, moments = _stem_attention(x, forms, mixture, value_weight, "block", border, x.requires_grad, True)
    return pooled, *moments.unbind()


@torch.compiler.assume_constant_result  # a compiler does not trace what it needs to ask: whether there is a kernel
def kernel_serves(device: str, dtype: torch.dtype, channels: int, backend: str) -> bool:
    """Whether the C++ kernel is the choice for an image of that device, dtype and number of channels."""
    if device != "cpu" or channels != cpu.STEM_CHANNELS or dtype not in cpu.DTYPES:
        return False
    return choose_backend(torch.empty(1, 1, 1, 1, 1, dtype=dtype), 1, backend) == "cpu"


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
    image_gradient: bool,
    pooled: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    weights, (out, index) = (forms, mixture, value_weight), _empty_outputs(x, mixture, value_weight, pooled)
    moments = cpu.stem_forward(weights, x, window, border, out, index if pooled else None)
    return out, index, x.new_empty(0, dtype=torch.float64) if moments is None else moments


@_stem_attention.register_fake
def _(x, forms, mixture, value_weight, window, border, image_gradient, pooled):
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weights, grad_x = (forms, mixture, value_weight), empty_like_map(x) if image_gradient else None
    extra = (index, slopes.contiguous()) if pooled else ()
    grads = cpu.stem_backward(weights, x, window, border, grad_out, grad_x, *extra)
    return x.new_empty(0) if grad_x is None else grad_x, *grads


@_stem_attention_backward.register_fake
def _(grad_out, index, slopes, x, forms, mixture, value_weight, window, border, image_gradient, pooled):
    grad_x = empty_like_map(x) if image_gradient else x.new_empty(0)
    return grad_x, *(torch.empty_like(y, memory_format=torch.contiguous_format) for y in (forms, mixture, value_weight))


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:4], *output[1:])
    ctx.mark_non_differentiable(output[1])
    ctx.options = inputs[4:]


def _backward(ctx, grad_out, grad_index, grad_moments):
    *inputs, index, moments = ctx.saved_tensors
    x, pooled = inputs[0], ctx.options[-1]
    slopes = moments
    if pooled:  # of the mean, sum(o) / n, and of the variance, sum((o - mean)^2) / n
        of_mean, of_variance = grad_moments / (x.shape[0] * x.shape[2] * x.shape[3])
        slopes = torch.stack((of_mean - 2 * of_variance * moments[0], 2 * of_variance)).to(x.dtype)
    grad_x, *grads = _stem_attention_backward(grad_out, index, slopes, *inputs, *ctx.options)
    return grad_x if ctx.options[2] else None, *grads, None, None, None, None


torch.library.register_autograd("sasa::stem_attention", _backward, setup_context=_setup_context)
