"""FLOPs of our operators by their equations: a multiply-add is 2, whatever a backend computes.

`torch.utils.flop_counter.FlopCounterMode` counts by these formulas. It leaves out what it has no formula for (batch
norm, ReLU, pools, sums, biases); the rest agrees with sasa/analysis/flops.py, which explains it and uses the same
functions. Backward counts twice the forward, as FlopCounterMode counts convolutions.
"""

import functools
import math

import torch

from sasa.kernels import operators, projected_operator, stem_operator  # noqa: F401 : they define what has formulas here


def attention_flops(pairs: int, channels: int, num_heads: int, content: bool, relative: bool, scaled: bool) -> dict:
    """Of the core of local attention, by kind.

    Args:
        pairs: of a query and a key: pixels (of the batch) times K * K.
        channels: of all heads together.
        num_heads: N.
        content, relative: whether the logits have q.k, and q.r.
        scaled: whether the logits are multiplied by a number other than 1.
    """
    relative_keys = channels if content and relative else 0  # k + r
    return {
        "logits": (relative_keys + 2 * channels + (num_heads if scaled else 0)) * pairs,
        "softmax": 5 * num_heads * pairs,
        "weighted sum": 2 * channels * pairs,
    }


def stem_flops(pixels: int, side: int, in_channels: int, channels: int, num_heads: int, num_matrices: int,
               mixed: bool, sliding: bool) -> dict:  # fmt: skip
    """Of the attention stem with 1x1 values, by kind.

    Args:
        pixels: of the batch of images.
        side: S of the S x S window.
        in_channels, channels, num_heads: of the layer.
        num_matrices: M value matrices.
        mixed: whether a value is a mixture of them.
        sliding: a window around each pixel, which so has a value for each window that it is in; else one.
    """
    pairs = pixels * side**2
    return {
        "projection": 2 * (2 + num_matrices) * channels * in_channels * pixels,
        "value mixture": 2 * num_matrices * channels * (pairs if sliding else pixels) if mixed else 0,
        **attention_flops(pairs, channels, num_heads, True, False, False),
    }


def _attention(query, has_key: bool, rel_row, kernel_size: int, scale: float) -> int:
    batch, num_heads, head_dim, height, width = query
    pairs = batch * height * width * kernel_size**2
    return sum(
        attention_flops(pairs, num_heads * head_dim, num_heads, has_key, rel_row is not None, scale != 1).values()
    )


def _forward(query, key, value, rel_row, rel_col, kernel_size, border, scale, *rest, **others) -> int:
    return _attention(query, key is not None, rel_row, kernel_size, scale)


def _backward(
    grad_out, query, key, value, rel_row, rel_col, out, lse, kernel_size, border, scale, *rest, **others
) -> int:
    return 2 * _attention(query, key is not None, rel_row, kernel_size, scale)


def _packed(qkv, rel_row, rel_col, kernel_size, border, scale, *rest, **others) -> int:
    return _attention((qkv[0], *qkv[2:]), qkv[1] == 3, rel_row, kernel_size, scale)


def _packed_backward(grad_out, qkv, rel_row, rel_col, out, lse, kernel_size, border, scale, *rest, **others) -> int:
    return 2 * _attention((qkv[0], *qkv[2:]), qkv[1] == 3, rel_row, kernel_size, scale)


def _pooled_backward(grad_out, qkv, rel_row, rel_col, lse, kernel_size, border, scale, *rest, **others) -> int:
    return 2 * _attention((qkv[0], *qkv[2:]), qkv[1] == 3, rel_row, kernel_size, scale)


def _projected(
    projection, x, weight, rel_row, rel_col, parts, num_heads, kernel_size, border, scale, *rest, **others
) -> int:
    batch, inputs, height, width = x
    query = (batch, num_heads, weight[0] // (parts * num_heads), height, width)
    products = 2 * weight[0] * inputs * batch * height * width
    return products + _attention(query, parts == 3, rel_row, kernel_size, scale)


def _projected_backward(
    grad_out, kept, rel_row, rel_col, out, lse, parts, kernel_size, border, scale, *rest, **others
) -> int:
    """Without the gradients of the projection, which are a convolution's."""
    query = (*grad_out[:3], *lse[2:])
    return 2 * _attention(query, parts == 3, rel_row, kernel_size, scale)


def _stem(x, forms, mixture, value_weight, window: str) -> int:
    batch, in_channels, height, width = x
    positions, num_matrices = mixture
    pixels, side = batch * height * width, math.isqrt(positions)
    sizes = (pixels, side, in_channels, value_weight[1], forms[0], num_matrices)
    return sum(stem_flops(*sizes, num_matrices > 1, window == "sliding").values())


def _stem_forward(x, forms, mixture, value_weight, window, *rest, **others) -> int:
    return _stem(x, forms, mixture, value_weight, window)


def _stem_backward(grad_out, index, slopes, x, forms, mixture, value_weight, window, *rest, **others) -> int:
    return 2 * _stem(x, forms, mixture, value_weight, window)


_FORMULAS = {
    "local_attention": _forward,
    "local_attention_backward": _backward,
    "local_attention_packed": _packed,
    "local_attention_packed_backward": _packed_backward,
    "local_attention_pooled": _packed,
    "local_attention_pooled_backward": _pooled_backward,
    "projected_attention": _projected,
    "projected_attention_backward": _projected_backward,
    "stem_attention": _stem_forward,
    "stem_attention_backward": _stem_backward,
}


@functools.cache
def register() -> None:
    """Makes the formulas known to `FlopCounterMode`, once a process.

    The layers call it when they are made, not this module when it is imported: torch's counter imports Triton, which
    takes a while and reads its settings from the environment then.
    """
    from torch.utils.flop_counter import register_flop_formula

    for name, formula in _FORMULAS.items():
        register_flop_formula(getattr(torch.ops.sasa, name))(formula)
