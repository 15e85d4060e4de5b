"""Local attention as a function of query, key, value and embeddings: the one way in, `local_attention`.

It checks its arguments and calls one registered operator, `sasa::local_attention`, whatever the backend, so that
torch.compile, torch.export, autocast and autograd see the same thing everywhere. The backend is chosen inside the
operator, from device, dtype and shape.

A backend is a module with four functions:
    unusable()                        why it cannot run on this machine, or None
    unsupported(query, kernel_size)   why it cannot take this call, or None
    forward(query, key, value, rel_row, rel_col, kernel_size, border, scale) -> out, lse
    backward(grad_out, query, key, value, rel_row, rel_col, out, lse, kernel_size, border, scale)
        -> gradients of query, key, value, rel_row, rel_col (None where the input is None)
out and lse (natural log-sum-exp of the logits) mean the same in each, so forward and backward can be of two backends.

Shapes: B batch, N heads, D head width, H x W map, K window side.
"""

import importlib
import os
from types import ModuleType
from typing import Optional

import torch
from torch import Tensor

BORDERS = ("mask", "zero")
# Fastest first: "auto" takes the first that is usable here and takes the call.
_MODULES = {"cpu": "kernels.cpu", "tiled": "kernels.tiled", "reference": "kernels.reference"}


def _module(name: str) -> ModuleType:
    return importlib.import_module(_MODULES[name])


def backends() -> dict[str, str | None]:
    """Each backend's name -> None where it is usable on this machine, or the reason why not."""
    return {name: _module(name).unusable() for name in _MODULES}


def check_backend(backend: str) -> None:
    """Raises ValueError unless `backend` is "auto" or the name of a backend that is usable on this machine."""
    if backend == "auto":
        return
    if backend not in _MODULES:
        raise ValueError(f"backend={backend!r}: allowed are {', '.join(('auto', *_MODULES))}")
    reason = _module(backend).unusable()
    if reason is not None:
        raise ValueError(f"backend={backend!r} is not usable here: {reason}")


def choose_backend(query: Tensor, kernel_size: int, backend: str = "auto") -> str:
    """The name of the backend that serves this call: the one asked for, SASA_BACKEND's, or the fastest that can.

    Raises:
        ValueError: the backend asked for (or named by SASA_BACKEND) is unknown, not usable here, or refuses the call.
    """
    if backend == "auto":
        backend = os.environ.get("SASA_BACKEND") or "auto"
    check_backend(backend)
    if backend != "auto":
        reason = _module(backend).unsupported(query, kernel_size)
        if reason is not None:
            raise ValueError(f"backend={backend!r} does not take this call: {reason}")
        return backend
    for name in _MODULES:
        module = _module(name)
        if module.unusable() is None and module.unsupported(query, kernel_size) is None:
            return name
    raise AssertionError("the reference backend takes every call")


def _empty_like_map(query: Tensor) -> Tensor:
    """An uninitialised (B, N, D, H, W) map; heads and channels innermost where query's channels are, else contiguous."""
    b, n, d, h, w = query.shape
    if query.stride(2) == 1 and query.stride(4) != 1:
        return query.new_empty((b, h, w, n, d)).permute(0, 3, 4, 1, 2)
    return query.new_empty((b, n, d, h, w))


def _to_layout(x: Tensor, like: Tensor) -> Tensor:
    """`x` in the layout of `_empty_like_map(like)`: the strides that an operator promises must be the real ones."""
    target = _empty_like_map(like)
    return x if x.stride() == target.stride() else target.copy_(x)


@torch.library.custom_op("sasa::local_attention", mutates_args=())
def _local_attention(
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
    module = _module(choose_backend(query, kernel_size, backend))
    out, lse = module.forward(query, key, value, rel_row, rel_col, kernel_size, border, scale)
    return _to_layout(out, query), lse.contiguous()


@_local_attention.register_fake
def _(query, key, value, rel_row, rel_col, kernel_size, border, scale, backend):
    b, n, _, h, w = query.shape
    acc = torch.float64 if query.dtype == torch.float64 else torch.float32
    return _empty_like_map(query), query.new_empty((b, n, h, w), dtype=acc)


@torch.library.custom_op("sasa::local_attention_backward", mutates_args=())
def _local_attention_backward(
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
    module = _module(choose_backend(query, kernel_size, backend))
    grads = module.backward(grad_out, query, key, value, rel_row, rel_col, out, lse, kernel_size, border, scale)
    grad_query, grad_key, grad_value, grad_row, grad_col = grads
    absent = query.new_empty(0)  # an operator returns tensors only; autograd below turns these back into None
    return (
        _to_layout(grad_query, query),
        absent if key is None else _to_layout(grad_key, query),
        _to_layout(grad_value, query),
        absent.clone() if rel_row is None else grad_row.contiguous(),
        absent.clone() if rel_col is None else grad_col.contiguous(),
    )


@_local_attention_backward.register_fake
def _(grad_out, query, key, value, rel_row, rel_col, out, lse, kernel_size, border, scale, backend):
    def embedding(x):
        return query.new_empty(0) if x is None else x.new_empty(x.shape)

    grad_key = query.new_empty(0) if key is None else _empty_like_map(query)
    return _empty_like_map(query), grad_key, _empty_like_map(query), embedding(rel_row), embedding(rel_col)


def _setup_context(ctx, inputs, output):
    query, key, value, rel_row, rel_col, *options = inputs
    ctx.save_for_backward(query, key, value, rel_row, rel_col, *output)
    ctx.options = options
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_out, grad_lse):
    query, key, value, rel_row, rel_col, out, lse = ctx.saved_tensors
    if grad_out is None:
        return (None,) * 9
    dq, dk, dv, drow, dcol = _local_attention_backward(
        grad_out, query, key, value, rel_row, rel_col, out, lse, *ctx.options
    )
    has_key, has_rel = key is not None, rel_row is not None
    return dq, dk if has_key else None, dv, drow if has_rel else None, dcol if has_rel else None, None, None, None, None


torch.library.register_autograd("sasa::local_attention", _backward, setup_context=_setup_context)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype of autocast where it is on for the device, else None (the meta device has none, and asking raises)."""
    if device.type != "meta" and torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return None


def local_attention(
    query: Tensor,
    key: Tensor | None,
    value: Tensor,
    rel_row: Tensor | None,
    rel_col: Tensor | None,
    *,
    kernel_size: int,
    border: str = "mask",
    scale: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """Attention of each pixel over the K x K window around it, with relative row and column embeddings.

    out = sum over the window of softmax(scale * (q.k + q.r)) * v, with r = concat(row embedding, column embedding) of
    the key's offset (Ramachandran et al. 2019, equation 3). The window of an even K reaches (K-1)//2 back and K//2
    ahead. Logits and softmax are computed in fp32 for half types and in fp64 for fp64. Under autocast every input is
    cast to autocast's dtype.

    Args:
        query, key, value: (B, N, D, H, W), any strides. key=None leaves q.k out and needs embeddings.
        rel_row, rel_col: (N, D/2, K), or both None.
        kernel_size: K, at least 1.
        border: "mask", keys outside the map have weight 0; "zero", they stay in the softmax as zero keys and values.
        scale: factor of the logits.
        backend: "auto" or a name of `backends()`; the environment variable SASA_BACKEND replaces "auto".

    Returns:
        (B, N, D, H, W), in query's dtype; channels innermost in memory where query's are.

    Raises:
        ValueError: shapes, dtypes or options that do not fit, or a backend that cannot serve the call.
    """
    _check(query, key, value, rel_row, rel_col, kernel_size, border, backend)
    dtype = autocast_dtype(query.device)
    if dtype is not None:
        query, key, value, rel_row, rel_col = (
            x if x is None or x.dtype == torch.float64 else x.to(dtype) for x in (query, key, value, rel_row, rel_col)
        )
    _check_dtypes(query, key, value, rel_row, rel_col)
    out, _ = _local_attention(query, key, value, rel_row, rel_col, kernel_size, border, float(scale), backend)
    return out


def _check(query, key, value, rel_row, rel_col, kernel_size, border, backend) -> None:
    if query.dim() != 5:
        raise ValueError(f"query must be (B, N, D, H, W), got shape {tuple(query.shape)}")
    if not query.is_floating_point():
        raise ValueError(f"query must be of a floating dtype, got {query.dtype}")
    for name, x in (("key", key), ("value", value)):
        if x is not None and x.shape != query.shape:
            raise ValueError(f"{name} must have query's shape {tuple(query.shape)}, got {tuple(x.shape)}")
    if kernel_size < 1:
        raise ValueError(f"kernel_size must be at least 1, got {kernel_size}")
    if border not in BORDERS:
        raise ValueError(f"border={border!r}: allowed are {', '.join(BORDERS)}")
    if backend != "auto" and backend not in _MODULES:
        raise ValueError(f"backend={backend!r}: allowed are {', '.join(('auto', *_MODULES))}")
    if (rel_row is None) != (rel_col is None):
        raise ValueError("rel_row and rel_col must both be given or both be None")
    if key is None and rel_row is None:
        raise ValueError("key=None leaves no logits without rel_row and rel_col")
    if rel_row is None:
        return
    num_heads, head_dim = query.shape[1:3]
    if head_dim % 2:
        raise ValueError(f"query's head width must be even with relative embeddings, got {head_dim}")
    for name, x in (("rel_row", rel_row), ("rel_col", rel_col)):
        wanted = (num_heads, head_dim // 2, kernel_size)
        if tuple(x.shape) != wanted:
            raise ValueError(f"{name} must be (N, D/2, K) = {wanted}, got {tuple(x.shape)}")


def _check_dtypes(query, key, value, rel_row, rel_col) -> None:
    for name, x in (("key", key), ("value", value), ("rel_row", rel_row), ("rel_col", rel_col)):
        if x is not None and (x.dtype != query.dtype or x.device != query.device):
            raise ValueError(f"{name} must be {query.dtype} on {query.device} like query, got {x.dtype} on {x.device}")
