"""Local attention as a function of query, key, value and embeddings.

Arguments are checked here and brought to autocast's dtype; sasa/kernels/operators.py does the rest. (Where a layer's
projections are made inside the kernel, projected_operator.py is the way in.)

Shapes: B batch, N heads, D head width, H x W map, K window side, P = 3 maps of a fused projection (query, key, value; 2
without key).
"""

import torch
from torch import Tensor
from torch.autograd import forward_ad

from sasa.kernels import operators, reference
from sasa.kernels.dispatch import check_name, choose_for, named_backend
from sasa.kernels.interface import (
    BORDERS,
    LARGEST_SCALE,
    AttentionOptions,
    CallKind,
    autocast_dtype,
    channels_innermost,
    without_autocast,
)
from sasa.kernels.tracing import constant_when_compiled, has_free_size, settled


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
    options = AttentionOptions(kernel_size, border, float(scale))
    _check(query, key is not None, rel_row, rel_col, options, backend)
    tensors = _to_autocast(query.device, query, key, value, rel_row, rel_col)
    _check_dtypes(*tensors)
    if composite_serves(backend, *tensors):
        return _composite(*tensors, options)
    return operators.local_attention(*tensors, *options, backend)[0]


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

    Args:
        qkv: (B, P, N, D, H, W), any strides; P = 3 for query, key and value, or 2 for query and value.
        rel_row, rel_col, kernel_size, border, scale, backend: as for `local_attention`.

    Returns:
        (B, N, D, H, W), in the dtype of qkv; channels innermost in memory where those of qkv are.

    Raises:
        ValueError: as `local_attention`.
    """
    if qkv.dim() != 6 or qkv.shape[1] not in (2, 3):
        raise ValueError(f"qkv must be (B, 3 or 2, N, D, H, W), got shape {tuple(qkv.shape)}")
    options = AttentionOptions(kernel_size, border, float(scale))
    _check(qkv[:, 0], qkv.shape[1] == 3, rel_row, rel_col, options, backend)
    qkv, rel_row, rel_col = _to_autocast(qkv.device, qkv, rel_row, rel_col)
    _check_dtypes(qkv, None, None, rel_row, rel_col)
    if composite_serves(backend, qkv, rel_row, rel_col):
        return _composite(*operators.split_packed(qkv), rel_row, rel_col, options)
    return operators.local_attention_packed(qkv, rel_row, rel_col, *options, backend)[0]


def local_attention_pooled(
    qkv: Tensor,
    rel_row: Tensor | None,
    rel_col: Tensor | None,
    *,
    kernel_size: int,
    border: str = "mask",
    scale: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """The averages of the 2 x 2 blocks of `local_attention_packed`, where `pools` says that a kernel makes them.

    Returns:
        (B, N, D, H/2, W/2): what an average pool makes of the other's result, which is never written.

    Raises:
        ValueError: as `local_attention_packed`.
    """
    options = AttentionOptions(kernel_size, border, float(scale))
    _check(qkv[:, 0], qkv.shape[1] == 3, rel_row, rel_col, options, backend)
    _check_dtypes(qkv, None, None, rel_row, rel_col)
    return operators.local_attention_pooled(qkv, rel_row, rel_col, *options, backend)[0]


def pools(qkv: Tensor, rel_row: Tensor | None, rel_col: Tensor | None, kernel_size: int, backend: str) -> bool:
    """Whether `local_attention_pooled` serves: where the C++ kernel does, of sides that 2 divides.

    Not in a trace of torch.jit, which would keep the answer for maps of other sizes.
    """
    if torch.jit.is_tracing() or has_free_size(qkv) or not pairs_up(qkv):
        return False
    if composite_serves(backend, qkv, rel_row, rel_col):
        return False
    return kernel_serves(qkv, qkv.shape[3], kernel_size, backend)


def pairs_up(x: Tensor) -> bool:
    """Whether 2 x 2 blocks cover a map (.., H, W)."""
    return x.shape[-1] % 2 == 0 and x.shape[-2] % 2 == 0


def kernel_serves(x: Tensor, head_dim: int, kernel_size: int, backend: str) -> bool:
    """Whether what x leads to is computed by the C++ kernel, in fp32 or fp64 throughout.

    Half types are rounded between the steps that it takes in one: they are left to the steps.
    """
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64) or autocast_dtype(x.device):
        return False
    return _cpu_serves(x.dtype, settled(head_dim), settled(kernel_size), backend)


@constant_when_compiled  # it asks whether there is a kernel here
def _cpu_serves(dtype: torch.dtype, head_dim: int, kernel_size: int, backend: str) -> bool:
    return choose_for(CallKind(torch.device("cpu"), dtype, head_dim, kernel_size), backend) == "cpu"


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
    """The logits that `local_attention` takes the softmax of, by the reference backend.

    Args:
        query, key, rel_row, rel_col, kernel_size, border, scale: as for `local_attention`.
        pixels: (P, 2), row and column of the only pixels whose logits are wanted; None for all.

    Returns:
        (B, N, H, W, K, K), or (B, N, P, K, K) with `pixels`: -inf at masked keys, in at least fp32.

    Raises:
        ValueError: as `local_attention`.
    """
    options = AttentionOptions(kernel_size, border, float(scale))
    _check(query, key is not None, rel_row, rel_col, options, "reference")
    query, key, rel_row, rel_col = _to_autocast(query.device, query, key, rel_row, rel_col)
    _check_dtypes(query, key, None, rel_row, rel_col)
    with without_autocast(query.device):
        return reference.logits(query, key, rel_row, rel_col, options, pixels)


def composite_serves(backend: str, *tensors: Tensor | None) -> bool:
    """Whether a call is computed outside the operators, in operations that PyTorch differentiates in every way.

    So it is with backend "composite", and without being named under a transform of torch.func, for tensors with a
    tangent (forward-mode derivatives) and in an export to ONNX, none of which see into an operator.

    Raises:
        RuntimeError: there, the backend was named and is one that cannot.
    """
    name = _name(backend)
    if name == "composite":
        return True
    if not (_is_transformed() or _has_tangent(*tensors)):
        return torch.onnx.is_in_onnx_export()
    if name in ("auto", "reference"):  # the reference is the same function
        return True
    raise RuntimeError(
        f"backend={name!r} has no forward-mode derivatives and no transforms of torch.func: backend='composite' has"
    )


@constant_when_compiled
def _name(backend: str) -> str:
    return named_backend(backend)


@constant_when_compiled
def _is_transformed() -> bool:
    """Inside torch.func.grad, vmap, jvp, ...; a compiler enters them while it traces, and keeps the answer."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def _has_tangent(*tensors: Tensor | None) -> bool:
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return False
    return any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors)


def _composite(
    query: Tensor,
    key: Tensor | None,
    value: Tensor,
    rel_row: Tensor | None,
    rel_col: Tensor | None,
    options: AttentionOptions,
) -> Tensor:
    """The reference's forward; autograd keeps the K * K copies that it makes."""
    with without_autocast(query.device):
        out, _ = reference.forward(query, key, value, rel_row, rel_col, options)
    if torch.onnx.is_in_onnx_export():  # no strides there
        return out
    if channels_innermost(query):
        return out.permute(0, 3, 4, 1, 2).contiguous().permute(0, 3, 4, 1, 2)
    return out.contiguous()


def _to_autocast(device: torch.device, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors in autocast's dtype where it is on; fp64 stays."""
    dtype = autocast_dtype(device)
    if dtype is None:
        return tensors
    return tuple(x if x is None or x.dtype == torch.float64 else x.to(dtype) for x in tensors)


def _check_maps(query: Tensor, key: Tensor | None, value: Tensor) -> None:
    if query.dim() != 5:
        raise ValueError(f"query must be (B, N, D, H, W), got shape {tuple(query.shape)}")
    if value is None:
        raise ValueError("value must be (B, N, D, H, W), got None")
    for name, x in (("key", key), ("value", value)):
        if x is not None and x.shape != query.shape:
            raise ValueError(f"{name} must have query's shape {tuple(query.shape)}, got {tuple(x.shape)}")


def _check(
    query: Tensor,
    has_key: bool,
    rel_row: Tensor | None,
    rel_col: Tensor | None,
    options: AttentionOptions,
    backend: str,
) -> None:
    if not query.is_floating_point():
        raise ValueError(f"query must be of a floating dtype, got {query.dtype}")
    if options.kernel_size < 1:
        raise ValueError(f"kernel_size must be at least 1, got {options.kernel_size}")
    if not -LARGEST_SCALE <= options.scale <= LARGEST_SCALE:
        raise ValueError(f"scale={options.scale}: must be finite, and at most {LARGEST_SCALE:.3g}")
    if options.border not in BORDERS:
        raise ValueError(f"border={options.border!r}: allowed are {', '.join(BORDERS)}")
    check_name(backend)
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
        wanted = (num_heads, head_dim // 2, options.kernel_size)
        if tuple(x.shape) != wanted:
            raise ValueError(f"{name} must be (N, D/2, K) = {wanted}, got {tuple(x.shape)}")


def _check_dtypes(query, key, value, rel_row, rel_col) -> None:
    for name, x in (("key", key), ("value", value), ("rel_row", rel_row), ("rel_col", rel_col)):
        if x is not None and (x.dtype != query.dtype or x.device != query.device):
            raise ValueError(f"{name} must be {query.dtype} on {query.device} like query, got {x.dtype} on {x.device}")
