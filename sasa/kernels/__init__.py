"""Local attention as a function of query, key, value and embeddings: the one way in, `local_attention`.

It checks its arguments and calls one registered operator, `sasa::local_attention`, whatever the backend, so that
torch.compile, torch.export, autocast and autograd see the same thing everywhere. The backend is chosen inside the
operator, from device, dtype and shape.

A backend is a module with four functions:
    unusable()                        why it cannot run on this machine, or None
    unsupported(query, kernel_size)   why it cannot take this call, or None
    forward(query, key, value, rel_row, rel_col, kernel_size, border, scale) -> out, lse
    backward(grad_out, query, key, value, rel_row, rel_col, out, lse, kernel_size, border, scale, into)
        -> gradients of query, key, value, rel_row, rel_col (None where the input is None), the first three written to
        the tensors of `into` (any strides) unless that is None
out and lse (natural log-sum-exp of the logits) mean the same in each, so forward and backward can be of two backends.

Shapes: B batch, N heads, D head width, H x W map, K window side, P = 3 maps of a fused projection (query, key, value; 2
without key).
"""

import contextlib
import importlib
import os
from types import ModuleType
from typing import Optional

import torch
from torch import Tensor

BORDERS = ("mask", "zero")
# Fastest first: "auto" takes the first that is usable here and takes the call.
_MODULES = {
    "triton": "sasa.kernels.triton_backend",
    "cpu": "sasa.kernels.cpu",
    "tiled": "sasa.kernels.tiled",
    "reference": "sasa.kernels.reference",
}


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
        try:
            check_backend(backend)
        except ValueError as error:
            raise ValueError(f"the environment variable SASA_BACKEND: {error}") from None
    else:
        check_backend(backend)
    if backend != "auto":
        reason = _module(backend).unsupported(query, kernel_size)
        if reason is not None:
            raise ValueError(f"backend={backend!r} does not take this call: {reason}")
        return backend
    for name in _MODULES:
        module = _module(name)
        if name == "triton" and query.device.type == "cpu":
            continue  # with TRITON_INTERPRET=1 it takes them, interpreted: far too slow to be chosen unasked
        if module.unusable() is None and module.unsupported(query, kernel_size) is None:
            return name
    raise AssertionError("the reference backend takes every call")


def empty_like_map(query: Tensor) -> Tensor:
    """An uninitialised (B, N, D, H, W) map; heads and channels innermost where query's are, else contiguous."""
    b, n, d, h, w = query.shape
    if query.stride(2) == 1 and query.stride(4) != 1:
        return query.new_empty((b, h, w, n, d)).permute(0, 3, 4, 1, 2)
    return query.new_empty((b, n, d, h, w))


def _empty_like_packed(qkv: Tensor) -> Tensor:
    """As `empty_like_map`, for a fused projection (B, P, N, D, H, W)."""
    b, p, n, d, h, w = qkv.shape
    if qkv.stride(3) == 1 and qkv.stride(5) != 1:
        return qkv.new_empty((b, h, w, p, n, d)).permute(0, 3, 4, 5, 1, 2)
    return qkv.new_empty((b, p, n, d, h, w))


def _without_autocast(device: torch.device):
    """An operator's body still sees autocast, which would narrow the products behind the fp32 logits."""
    if autocast_dtype(device) is None:
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def _to_layout(x: Tensor, like: Tensor) -> Tensor:
    """`x` in the layout of `empty_like_map(like)`: the strides that an operator promises must be the real ones."""
    target = empty_like_map(like)
    return x if x.stride() == target.stride() else target.copy_(x)


def _maps(query: Tensor, key: Tensor | None, value: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor]:
    """query, key, value; without `value`, they are the slices of a fused projection in `query`'s place."""
    if value is not None:
        return query, key, value
    parts = query.unbind(1)
    return parts[0], parts[1] if len(parts) == 3 else None, parts[-1]


@torch.library.custom_op("sasa::local_attention", mutates_args=())
def _local_attention(
    query: Tensor,
    key: Optional[Tensor],
    value: Optional[Tensor],
    rel_row: Optional[Tensor],
    rel_col: Optional[Tensor],
    kernel_size: int,
    border: str,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    query, key, value = _maps(query, key, value)
    module = _module(choose_backend(query, kernel_size, backend))
    with _without_autocast(query.device):
        out, lse = module.forward(query, key, value, rel_row, rel_col, kernel_size, border, scale)
    return _to_layout(out, query), lse.contiguous()


@_local_attention.register_fake
def _(query, key, value, rel_row, rel_col, kernel_size, border, scale, backend):
    query, _, _ = _maps(query, key, value)
    b, n, _, h, w = query.shape
    acc = torch.float64 if query.dtype == torch.float64 else torch.float32
    return empty_like_map(query), query.new_empty((b, n, h, w), dtype=acc)


def _empty_gradients(query, key, value, rel_row, rel_col) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Uninitialised gradients; an empty one for an absent input, since an operator returns tensors only.

    The gradient of a fused projection is one tensor, whose slices are written: nothing is concatenated.
    """

    def embedding(x):
        return query.new_empty(0) if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)

    if value is None:
        maps = (_empty_like_packed(query), query.new_empty(0), query.new_empty(0))
    else:
        maps = tuple(query.new_empty(0) if x is None else empty_like_map(query) for x in (query, key, value))
    return *maps, embedding(rel_row), embedding(rel_col)


@torch.library.custom_op("sasa::local_attention_backward", mutates_args=())
def _local_attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Optional[Tensor],
    value: Optional[Tensor],
    rel_row: Optional[Tensor],
    rel_col: Optional[Tensor],
    out: Tensor,
    lse: Tensor,
    kernel_size: int,
    border: str,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    grads = _empty_gradients(query, key, value, rel_row, rel_col)
    into = _maps(grads[0], None if key is None else grads[1], None if value is None else grads[2])
    q, k, v = _maps(query, key, value)
    module = _module(choose_backend(q, kernel_size, backend))
    with _without_autocast(q.device):
        *_, grad_row, grad_col = module.backward(
            grad_out, q, k, v, rel_row, rel_col, out, lse, kernel_size, border, scale, into
        )
    if rel_row is not None:
        grads[3].copy_(grad_row)
        grads[4].copy_(grad_col)
    return grads


@_local_attention_backward.register_fake
def _(grad_out, query, key, value, rel_row, rel_col, out, lse, kernel_size, border, scale, backend):
    return _empty_gradients(query, key, value, rel_row, rel_col)


def _setup_context(ctx, inputs, output):
    query, key, value, rel_row, rel_col, *options = inputs
    ctx.save_for_backward(query, key, value, rel_row, rel_col, *output)
    ctx.options = options
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_out, grad_lse):
    inputs, saved = ctx.saved_tensors[:5], ctx.saved_tensors
    if grad_out is None:
        return (None,) * 9
    grads = _local_attention_backward(grad_out, *saved, *ctx.options)
    grads = [None if x is None else grad for x, grad in zip(inputs, grads, strict=True)]
    return *grads, None, None, None, None


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
    _check_maps(query, key, value)
    return _attend((query, key, value), query, key is not None, rel_row, rel_col, kernel_size, border, scale, backend)


def local_attention_packed(
    qkv: Tensor,
    rel_row: Tensor | None,
    rel_col: Tensor | None,
    *,
    kernel_size: int,
    border: str = "mask",
    scale: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """`local_attention` of a fused projection, whose gradient comes out as one tensor too: nothing is concatenated.

    qkv (B, P, N, D, H, W), P = 3 for query, key and value, or 2 for query and value, any strides -> (B, N, D, H, W).

    Raises:
        ValueError: as `local_attention`.
    """
    if qkv.dim() != 6 or qkv.shape[1] not in (2, 3):
        raise ValueError(f"qkv must be (B, 3 or 2, N, D, H, W), got shape {tuple(qkv.shape)}")
    has_key = qkv.shape[1] == 3
    return _attend((qkv, None, None), qkv[:, 0], has_key, rel_row, rel_col, kernel_size, border, scale, backend)


def attention_logits(
    query: Tensor,
    key: Tensor | None,
    rel_row: Tensor | None,
    rel_col: Tensor | None,
    *,
    kernel_size: int,
    border: str = "mask",
    scale: float = 1.0,
    pixels: Tensor | None = None,
) -> Tensor:
    """What `local_attention` takes the softmax of, to look at, by the reference backend.

    Arguments as there -> (B, N, H, W, K, K), -inf at masked keys, in at least fp32; with `pixels` (P, 2), rows and
    columns, those of these pixels alone: (B, N, P, K, K).

    Raises:
        ValueError: as `local_attention`.
    """
    _check(query, key is not None, rel_row, rel_col, kernel_size, border, "reference")
    query, key, rel_row, rel_col = _to_autocast(query.device, query, key, rel_row, rel_col)
    _check_dtypes(query, key, None, rel_row, rel_col)
    with _without_autocast(query.device):
        return _module("reference").logits(query, key, rel_row, rel_col, kernel_size, border, scale, pixels)


def _to_autocast(device: torch.device, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors in autocast's dtype where it is on; fp64 stays."""
    dtype = autocast_dtype(device)
    if dtype is None:
        return tensors
    return tuple(x if x is None or x.dtype == torch.float64 else x.to(dtype) for x in tensors)


def _attend(maps, query, has_key: bool, rel_row, rel_col, kernel_size, border, scale, backend) -> Tensor:
    """The checks that both ways in share, autocast, and the operator."""
    _check(query, has_key, rel_row, rel_col, kernel_size, border, backend)
    tensors = _to_autocast(query.device, *maps, rel_row, rel_col)
    _check_dtypes(*tensors)
    out, _ = _local_attention(*tensors, kernel_size, border, float(scale), backend)
    return out


def _check_maps(query: Tensor, key: Tensor | None, value: Tensor) -> None:
    if query.dim() != 5:
        raise ValueError(f"query must be (B, N, D, H, W), got shape {tuple(query.shape)}")
    if value is None:
        raise ValueError("value must be (B, N, D, H, W), got None")
    for name, x in (("key", key), ("value", value)):
        if x is not None and x.shape != query.shape:
            raise ValueError(f"{name} must have query's shape {tuple(query.shape)}, got {tuple(x.shape)}")


def _check(query: Tensor, has_key: bool, rel_row, rel_col, kernel_size, border, backend) -> None:
    if not query.is_floating_point():
        raise ValueError(f"query must be of a floating dtype, got {query.dtype}")
    if kernel_size < 1:
        raise ValueError(f"kernel_size must be at least 1, got {kernel_size}")
    if border not in BORDERS:
        raise ValueError(f"border={border!r}: allowed are {', '.join(BORDERS)}")
    if backend != "auto" and backend not in _MODULES:
        raise ValueError(f"backend={backend!r}: allowed are {', '.join(('auto', *_MODULES))}")
    if (rel_row is None) != (rel_col is None):
        raise ValueError("rel_row and rel_col must both be given or both be None")
    if not has_key and rel_row is None:
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
