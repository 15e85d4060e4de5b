"""Backend "reference": local attention as the paper defines it, by unfold and softmax.

Slow and obvious, on any device and any floating dtype; every other backend is held against it. It keeps K * K copies
of keys and values, so its memory grows with K * K * H * W * C.

Shapes: B batch, N heads, D head width, H x W map, K window side; window axes i (rows) and j (columns).
Source: Ramachandran et al. 2019, equations 2 and 3.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from sasa.kernels.interface import AttentionOptions, CallKind, Gradients, Targets, accumulate_dtype, deliver


def unusable() -> str | None:
    """Why this backend cannot run here; None: it runs everywhere."""
    return None


def unsupported(kind: CallKind) -> str | None:
    """Why this backend cannot take this call; None: it takes every call."""
    return None


def reach(kernel_size: int) -> tuple[int, int]:
    """How far a window reaches back and ahead of its pixel; an even one reaches one further ahead."""
    return (kernel_size - 1) // 2, kernel_size // 2


def windows(x: Tensor, kernel_size: int) -> Tensor:
    """Each pixel's window of `x`, zeros outside the map: (..., H, W) -> (..., H, W, K, K)."""
    back, ahead = reach(kernel_size)
    padded = F.pad(x, (back, ahead, back, ahead))
    return padded.unfold(-2, kernel_size, 1).unfold(-2, kernel_size, 1)  # rows first: the unfolded axes go to the end


def sum_windows(x: Tensor, kernel_size: int) -> Tensor:
    """The transpose of `windows`, for gradients: (..., H, W, K, K) -> (..., H, W)."""
    height, width = x.shape[-4:-2]
    back, ahead = reach(kernel_size)
    total = x.new_zeros(*x.shape[:-4], height + back + ahead, width + back + ahead)
    for i in range(kernel_size):
        for j in range(kernel_size):
            total[..., i : i + height, j : j + width] += x[..., i, j]
    return total[..., back : back + height, back : back + width]


def relative_keys(rel_row: Tensor, rel_col: Tensor) -> Tensor:
    """r = concat(row embedding, column embedding): 2 x (N, D/2, K) -> (N, D, K, K)."""
    size = rel_row.shape[-1]
    rows = rel_row[:, :, :, None].expand(-1, -1, -1, size)
    cols = rel_col[:, :, None, :].expand(-1, -1, size, -1)
    return torch.cat((rows, cols), dim=1)


def logits(
    query: Tensor,
    key: Tensor | None,
    rel_row: Tensor | None,
    rel_col: Tensor | None,
    options: AttentionOptions,
    pixels: Tensor | None = None,
) -> Tensor:
    """scale * (q.k + q.r) over each window, masked keys at -inf: -> (B, N, H, W, K, K) in the accumulation dtype.

    `pixels` (P, 2), rows and columns: the windows of these alone, in memory for these alone -> (B, N, P, K, K).
    """
    kernel_size, border, scale = options
    acc = accumulate_dtype(query.dtype)
    query = query.to(acc)
    height, width = query.shape[-2:]
    at = (...,) if pixels is None else (..., *pixels.unbind(1))  # of a map (..., H, W): all of it, or (..., P)
    query_at = query[at]
    total = query.new_zeros(*query_at.shape[:2], *query_at.shape[3:], kernel_size, kernel_size)
    if key is not None:
        keys = windows(key.to(acc), kernel_size)[(*at, slice(None), slice(None))]
        total = total + torch.einsum("bnd...,bnd...ij->bn...ij", query_at, keys)
    if rel_row is not None:
        relative = relative_keys(rel_row.to(acc), rel_col.to(acc))
        total = total + torch.einsum("bnd...,ndij->bn...ij", query_at, relative)
    total = total * scale
    if border == "mask":
        # Contiguous: for strides that tie, as a view's do, a comparison ties down an exported height and width.
        inside = windows(torch.ones(height, width, device=query.device), kernel_size).contiguous() > 0  # (H, W, K, K)
        total = total.masked_fill(~inside[(*at, slice(None), slice(None))], float("-inf"))
    return total


def window_softmax(scores: Tensor) -> Tensor:
    """Softmax over each window: (..., K, K) -> (..., K, K), each K x K map sums to 1."""
    return scores.flatten(-2).softmax(-1).unflatten(-1, scores.shape[-2:])


def attention_weights(
    query: Tensor,
    key: Tensor | None,
    rel_row: Tensor | None,
    rel_col: Tensor | None,
    kernel_size: int,
    border: str = "mask",
    scale: float = 1.0,
) -> Tensor:
    """Softmax of the logits over each window: -> (B, N, H, W, K, K)."""
    return window_softmax(logits(query, key, rel_row, rel_col, AttentionOptions(kernel_size, border, scale)))


def forward(
    query: Tensor,
    key: Tensor | None,
    value: Tensor,
    rel_row: Tensor | None,
    rel_col: Tensor | None,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor]:
    """See `interface.Backend.forward`."""
    scores = logits(query, key, rel_row, rel_col, options)
    lse = scores.flatten(-2).logsumexp(-1)
    attn = window_softmax(scores)
    out = torch.einsum("bnhwij,bndhwij->bndhw", attn, windows(value.to(attn.dtype), options.kernel_size))
    return out.to(query.dtype), lse


def backward(
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
    """See `interface.Backend.backward`.

    Written out, not left to autograd: an operator's implementation runs below it.
    """
    kernel_size, _, scale = options
    acc = accumulate_dtype(query.dtype)
    attn = window_softmax(logits(query, key, rel_row, rel_col, options))
    g, q = grad_out.to(acc), query.to(acc)
    grad_attn = torch.einsum("bndhw,bndhwij->bnhwij", g, windows(value.to(acc), kernel_size))
    delta = (attn * grad_attn).sum((-2, -1), keepdim=True)
    grad_logits = scale * attn * (grad_attn - delta)  # of q.k + q.r
    grad_value = sum_windows(g[..., None, None] * attn[:, :, None], kernel_size)
    grad_query = torch.zeros_like(q)
    grad_key = grad_row = grad_col = None
    if key is not None:
        grad_query += torch.einsum("bnhwij,bndhwij->bndhw", grad_logits, windows(key.to(acc), kernel_size))
        grad_key = sum_windows(q[..., None, None] * grad_logits[:, :, None], kernel_size).to(key.dtype)
    if rel_row is not None:
        grad_query += torch.einsum("bnhwij,ndij->bndhw", grad_logits, relative_keys(rel_row.to(acc), rel_col.to(acc)))
        half = rel_row.shape[1]
        grad_row = torch.einsum("bndhw,bnhwij->ndi", q[:, :, :half], grad_logits).to(rel_row.dtype)
        grad_col = torch.einsum("bndhw,bnhwij->ndj", q[:, :, half:], grad_logits).to(rel_col.dtype)
    maps = (grad_query.to(query.dtype), grad_key, grad_value.to(value.dtype))
    return *deliver(maps, into), grad_row, grad_col
