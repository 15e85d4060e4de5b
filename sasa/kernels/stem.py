"""Attention of the stem as functions of tensors: logits q.k of an image of few channels, values that know their place.

A head's logits need no queries or keys of head width: q.k = x^T (Wq^T Wk) y is a form of the C x C image channels, so
nothing wider than the image is unfolded. The value of a key at position p of its window is one mixed matrix of that
position times the pixel, sum_m p(a, b, m) W_V^m.

Shapes: B batch, C image channels (3), H x W image, N heads, D head width, S window side, M mixtures, P = S * S
positions of a window (row-major). Source: Ramachandran et al. 2019, section 3.3.
"""

import math

import torch
from torch import Tensor

from sasa.kernels.interface import accumulate_dtype
from sasa.kernels.reference import attention_weights, windows
from sasa.kernels.tracing import join_sides, split_sides


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


def window_logits(queries: Tensor, keys: Tensor, forms: Tensor, inside: Tensor | None) -> Tensor:
    """q.k of every query with the keys of its window, -inf where not `inside` (None: every key counts).

    queries (..., Q, C), keys (..., P, C), forms (N, C, C), inside (..., P) -> (..., N, Q, P).
    """
    logits = torch.einsum("...qc,ncd,...kd->...nqk", queries, forms, keys)
    return logits if inside is None else logits.masked_fill(~inside[..., None, None, :], float("-inf"))


def logits_at(x: Tensor, forms: Tensor, pixels: Tensor, size: int, window: str, border: str) -> Tensor:
    """The logits of chosen pixels alone: x (B, C, H, W), pixels (P, 2) rows and columns -> (B, N, P, S, S).

    The S x S axes are the pixel's own block (window "block") or the window around it ("sliding").
    """
    x = x.to(accumulate_dtype(x.dtype))
    queries = x[:, :, pixels[:, 0], pixels[:, 1]].transpose(1, 2)[:, :, None]  # (B, P, 1, C)
    keys, inside = keys_at(x, pixels, size, window, border)
    logits = window_logits(queries, keys, forms, inside)  # (B, P, N, 1, S * S)
    return logits.squeeze(3).transpose(1, 2).unflatten(-1, (size, size))


def keys_at(x: Tensor, pixels: Tensor, size: int, window: str, border: str) -> tuple[Tensor, Tensor | None]:
    """What chosen pixels see of a map (B, C, H, W): (B, P, S * S, C), and which of it counts, (1, P, S * S) or None."""
    rows, cols = pixels.unbind(1)

    def gather(maps: Tensor) -> Tensor:
        if window == "sliding":
            return windows(maps, size)[:, :, rows, cols].flatten(-2).permute(0, 2, 3, 1)
        return to_blocks(maps, size)[:, rows // size, cols // size]

    return gather(x), gather(x.new_ones(1, 1, *x.shape[-2:]))[..., 0] > 0 if border == "mask" else None


def logits_of_maps_at(
    query: Tensor, key: Tensor, num_heads: int, pixels: Tensor, size: int, window: str, border: str
) -> Tensor:
    """`logits_at` of projected maps: query, key (B, N * D, H, W), pixels (P, 2) -> (B, N, P, S, S)."""
    query, key = (y.to(accumulate_dtype(y.dtype)) for y in (query, key))
    queries = query[:, :, pixels[:, 0], pixels[:, 1]].unflatten(1, (num_heads, -1))  # (B, N, D, P)
    keys, inside = keys_at(key, pixels, size, window, border)
    logits = torch.einsum("bndp,bpknd->bnpk", queries, keys.unflatten(-1, (num_heads, -1)))
    logits = logits if inside is None else logits.masked_fill(~inside, float("-inf"))
    return logits.unflatten(-1, (size, size))


def block_attention(x: Tensor, forms: Tensor, value: Tensor, block_size: int, border: str) -> Tensor:
    """Attention inside aligned S x S blocks that do not overlap.

    x (B, C, H, W), value (B, N * D, H, W) -> (B, N * D, H, W). A ragged last block attends within what there is of it
    (`mask`), or over its zero-filled rest too (`zero`).
    """
    height, width = x.shape[-2:]
    pixels = to_blocks(x.to(accumulate_dtype(x.dtype)), block_size)  # (B, H/S, W/S, P, C)
    ones = x.new_ones(1, 1, height, width)
    inside = to_blocks(ones, block_size)[..., 0] > 0 if border == "mask" else None  # (1, H/S, W/S, P)
    attn = window_logits(pixels, pixels, forms, inside).softmax(-1).to(value.dtype)
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
    inside = windows(x.new_ones(x.shape[-2:]), size).flatten(-2) > 0 if border == "mask" else None  # (H, W, P)
    queries, keys = x.to(acc).permute(0, 2, 3, 1)[..., None, :], neighbours.to(acc).permute(0, 2, 3, 4, 1)
    attn = window_logits(queries, keys, forms, inside).squeeze(-2)  # (B, H, W, N, P)
    attn = attn.softmax(-1).to(value_weight.dtype)
    # The M * C inputs of a head, each weighted by attention and mixture, are all its values need.
    inputs = torch.einsum("bchwp,pm->bhwpmc", neighbours.to(attn.dtype), mixture.to(attn.dtype)).flatten(-2)
    mixed = attn @ inputs  # (B, H, W, N, M * C)
    weight = value_weight.unflatten(1, (num_heads, -1)).permute(1, 2, 0, 3).flatten(2)  # (N, D, M * C)
    return torch.einsum("bhwni,ndi->bndhw", mixed, weight).flatten(1, 2)


def attention_of_maps(
    query: Tensor, key: Tensor, value: Tensor, mixture: Tensor, num_heads: int, window: str, border: str
) -> Tensor:
    """`block_attention` or `sliding_attention` of projected maps, where projections are more than their weights.

    query, key (B, N * D, H, W), value (B, M * N * D, H, W), mixture p (P, M) -> (B, N * D, H, W).
    """
    dtype, (positions, mixtures) = value.dtype, mixture.shape
    height, width = query.shape[-2:]
    size, heads = math.isqrt(positions), (num_heads, -1)
    wide = accumulate_dtype(dtype)
    query, key, value, mixture = (y.to(wide) for y in (query, key, value, mixture))
    value = value.unflatten(1, (mixtures, -1))  # (B, M, N * D, H, W)
    if window == "sliding":
        attn = attention_weights(query.unflatten(1, heads), key.unflatten(1, heads), None, None, size, border)
        weighted = attn[..., None] * mixture.unflatten(0, (size, size))  # (B, N, H, W, S, S, M)
        out = torch.zeros_like(query.unflatten(1, heads))
        for part, values in zip(weighted.unbind(-1), value.unbind(1), strict=True):
            out = out + torch.einsum("bnhwij,bndhwij->bndhw", part, windows(values.unflatten(1, heads), size))
        return out.flatten(1, 2).to(dtype)
    queries, keys = (to_blocks(y, size).unflatten(-1, heads) for y in (query, key))  # (B, H/S, W/S, P, N, D)
    logits = torch.einsum("bhwqnd,bhwknd->bhwnqk", queries, keys)
    if border == "mask":
        inside = to_blocks(query.new_ones(1, 1, height, width), size)[..., 0] > 0  # (1, H/S, W/S, P)
        logits = logits.masked_fill(~inside[..., None, None, :], float("-inf"))
    values = to_blocks(value.flatten(1, 2), size).unflatten(-1, (mixtures, *heads))  # (B, H/S, W/S, P, M, N, D)
    values = torch.einsum("bhwpmnd,pm->bhwpnd", values, mixture)
    out = torch.einsum("bhwnqk,bhwknd->bhwqnd", logits.softmax(-1), values).flatten(-2)
    return from_blocks(out, size, height, width).to(dtype)


def mixed_block_values(x: Tensor, mixture: Tensor, value_weight: Tensor) -> Tensor:
    """v_ab = (sum_m p(a, b, m) W_V^m) x_ab, (a, b) the position inside the block: (B, C, H, W) -> (B, N * D, H, W)."""
    height, width = x.shape[-2:]
    size = math.isqrt(mixture.shape[0])
    matrices = torch.einsum("pm,moc->poc", mixture, value_weight)  # (P, N * D, C)
    return from_blocks(torch.einsum("bhwpc,poc->bhwpo", to_blocks(x, size), matrices), size, height, width)


def to_blocks(x: Tensor, size: int) -> Tensor:
    """(B, C, H, W) -> (B, ceil(H/S), ceil(W/S), P, C), a ragged last block filled up with zeros."""
    x = split_sides(x, size)  # (B, C, H/S, S, W/S, S)
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3, 4)


def from_blocks(x: Tensor, size: int, height: int, width: int) -> Tensor:
    """The inverse of `to_blocks`: (B, ceil(H/S), ceil(W/S), P, C) -> (B, C, H, W)."""
    x = x.unflatten(3, (size, size)).permute(0, 5, 1, 3, 2, 4)  # (B, C, H/S, S, W/S, S)
    return join_sides(x, height, width)
