"""Attention of the stem as functions of tensors: logits q.k of an image of few channels, values that know their place.

A head's logits need no queries or keys of head width: q.k = x^T (Wq^T Wk) y is a form of the C x C image channels, so
nothing wider than the image is unfolded. The value of a key at position p of its window is one mixed matrix of that
position times the pixel, sum_m p(a, b, m) W_V^m.

Shapes: B batch, C image channels (3), H x W image, N heads, D head width, S window side, M mixtures, P = S * S
positions of a window (row-major). Source: Ramachandran et al. 2019, section 3.3.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import choose_backend, cpu
from kernels.reference import accumulate_dtype, windows


def logit_forms(query_weight: Tensor, key_weight: Tensor, num_heads: int) -> Tensor:
    """Wq^T Wk of each head: 2 x (N * D, C) -> (N, C, C) in the accumulation dtype; logit = x_query^T form x_key."""
    wide = accumulate_dtype(query_weight.dtype)
    query_weight, key_weight = (w.to(wide).unflatten(0, (num_heads, -1)) for w in (query_weight, key_weight))
    return query_weight.transpose(1, 2) @ key_weight  # (N, C, D) @ (N, D, C)


def mixture_weights(emb_row: Tensor, emb_col: Tensor, emb_mix: Tensor) -> Tensor:
    """p(a, b, m) = softmax over m of (emb_row(a) + emb_col(b)) . emb_mix(m): 2 x (e, S), (M, e) -> (P, M)."""
    wide = accumulate_dtype(emb_row.dtype)
    place = emb_row[:, :, None].to(wide) + emb_col[:, None, :].to(wide)  # (e, S, S)
    return (emb_mix.to(wide) @ place.flatten(1)).softmax(0).t().to(emb_row.dtype)


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


def _empty_map(x: Tensor, channels: int, side: int = 1) -> Tensor:
    """An uninitialised (B, channels, ceil(H / side), ceil(W / side)) map, channels innermost where x's are."""
    b, _, h, w = x.shape
    h, w = -(-h // side), -(-w // side)
    if x.stride(1) == 1 and x.stride(3) != 1:
        return x.new_empty((b, h, w, channels)).permute(0, 3, 1, 2)
    return x.new_empty((b, channels, h, w))


def _empty_outputs(x: Tensor, mixture: Tensor, value_weight: Tensor, pooled: bool) -> tuple[Tensor, Tensor]:
    """The output, and the places of the largest values where it is pooled."""
    channels, side = value_weight.shape[1], math.isqrt(mixture.shape[0]) if pooled else 1
    return _empty_map(x, channels, side), _empty_map(x, channels, side) if pooled else x.new_empty(0)


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
    weights, grad_x = (forms, mixture, value_weight), _empty_map(x, x.shape[1]) if image_gradient else None
    extra = (index, slopes.contiguous()) if pooled else ()
    grads = cpu.stem_backward(weights, x, window, border, grad_out, grad_x, *extra)
    return x.new_empty(0) if grad_x is None else grad_x, *grads


@_stem_attention_backward.register_fake
def _(grad_out, index, slopes, x, forms, mixture, value_weight, window, border, image_gradient, pooled):
    grad_x = _empty_map(x, x.shape[1]) if image_gradient else x.new_empty(0)
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


def block_attention(x: Tensor, forms: Tensor, value: Tensor, block_size: int, border: str) -> Tensor:
    """Attention inside aligned S x S blocks that do not overlap.

    x (B, C, H, W), value (B, N * D, H, W) -> (B, N * D, H, W). A ragged last block attends within what there is of it
    (`mask`), or over its zero-filled rest too (`zero`).
    """
    height, width = x.shape[-2:]
    pixels = to_blocks(x.to(accumulate_dtype(x.dtype)), block_size)  # (B, H/S, W/S, P, C)
    logits = torch.einsum("bhwqc,ncd,bhwkd->bhwnqk", pixels, forms, pixels)
    if border == "mask":
        inside = to_blocks(x.new_ones(1, 1, height, width), block_size)[..., 0] > 0  # (1, H/S, W/S, P)
        logits = logits.masked_fill(~inside[:, :, :, None, None, :], float("-inf"))
    attn = logits.softmax(-1).to(value.dtype)
    num_heads = forms.shape[0]
    values = to_blocks(value, block_size).unflatten(-1, (num_heads, -1)).transpose(3, 4)  # (B, H/S, W/S, N, P, D)
    out = (attn @ values).transpose(3, 4).flatten(-2)  # (B, H/S, W/S, P, N * D)
    return from_blocks(out, block_size, height, width)


def sliding_attention(x: Tensor, forms: Tensor, mixture: Tensor, value_weight: Tensor, border: str) -> Tensor:
    """Attention over the S x S window around each pixel, values mixed by the offset in the window.

    x (B, C, H, W), mixture p (P, M), value_weight (M, N * D, C) -> (B, N * D, H, W). The window of an even S reaches
    (S-1)//2 back and S//2 ahead.
    """
    acc = accumulate_dtype(x.dtype)
    num_heads, size = forms.shape[0], math.isqrt(mixture.shape[0])
    neighbours = windows(x, size).flatten(-2)  # (B, C, H, W, P)
    wide = neighbours.to(acc)
    logits = torch.einsum("bchw,ncd,bdhwp->bhwnp", x.to(acc), forms, wide)
    if border == "mask":
        inside = windows(x.new_ones(x.shape[-2:]), size).flatten(-2) > 0  # (H, W, P)
        logits = logits.masked_fill(~inside[None, :, :, None, :], float("-inf"))
    attn = logits.softmax(-1).to(value_weight.dtype)  # (B, H, W, N, P)
    # The M * C inputs of a head, each weighted by attention and mixture, are all its values need.
    inputs = torch.einsum("bchwp,pm->bhwpmc", neighbours.to(attn.dtype), mixture.to(attn.dtype)).flatten(-2)
    mixed = attn @ inputs  # (B, H, W, N, M * C)
    weight = value_weight.unflatten(1, (num_heads, -1)).permute(1, 2, 0, 3).flatten(2)  # (N, D, M * C)
    return torch.einsum("bhwni,ndi->bndhw", mixed, weight).flatten(1, 2)


def mixed_block_values(x: Tensor, mixture: Tensor, value_weight: Tensor) -> Tensor:
    """v_ab = (sum_m p(a, b, m) W_V^m) x_ab, (a, b) the position inside the block: (B, C, H, W) -> (B, N * D, H, W)."""
    height, width = x.shape[-2:]
    size = math.isqrt(mixture.shape[0])
    matrices = torch.einsum("pm,moc->poc", mixture, value_weight)  # (P, N * D, C)
    return from_blocks(torch.einsum("bhwpc,poc->bhwpo", to_blocks(x, size), matrices), size, height, width)


def to_blocks(x: Tensor, size: int) -> Tensor:
    """(B, C, H, W) -> (B, ceil(H/S), ceil(W/S), P, C), a ragged last block filled up with zeros."""
    x = F.pad(x, (0, -x.shape[-1] % size, 0, -x.shape[-2] % size))
    x = x.unflatten(-1, (-1, size)).unflatten(-3, (-1, size))  # (B, C, H/S, S, W/S, S)
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3, 4)


def from_blocks(x: Tensor, size: int, height: int, width: int) -> Tensor:
    """The inverse of `to_blocks`: (B, ceil(H/S), ceil(W/S), P, C) -> (B, C, H, W)."""
    x = x.unflatten(3, (size, size)).permute(0, 5, 1, 3, 2, 4)  # (B, C, H/S, S, W/S, S)
    return x.flatten(4, 5).flatten(2, 3)[:, :, :height, :width]
