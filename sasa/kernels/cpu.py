"""Backend "cpu": local attention by the C++ kernel of cpu.cpp, the stem's attention by that of stem.cpp.

Threads are torch's own: a kernel is handed GOMP_parallel of the OpenMP runtime that torch has loaded, and follows
torch.set_num_threads.
Shapes: B batch, N heads, D head width, H x W map, K window side.
"""

import ctypes
import functools
import math
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from sasa.kernels.build import library
from sasa.kernels.interface import (
    AttentionOptions,
    CallKind,
    Gradients,
    Targets,
    empty_inner_map,
    empty_like_map,
    empty_map,
)

MAX_KERNEL_SIZE = 13  # kMaxWindow of csrc/frame.h
STEM_CHANNELS = 3  # C of stem.cpp
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def unusable() -> str | None:
    """Why the kernel cannot run here (no compiler, a failed build), or None. The first call builds or loads it."""
    found = library(torch.float32)
    return found if isinstance(found, str) else None


def unsupported(kind: CallKind) -> str | None:
    """Why the kernel cannot take calls of this kind, or None."""
    if kind.device.type != "cpu":
        return f"it takes CPU tensors, got {kind.device.type}"
    if kind.dtype not in DTYPES:
        return f"it takes fp32, fp64, bf16 and fp16, got {kind.dtype}"
    if kind.kernel_size > MAX_KERNEL_SIZE:
        return f"it takes kernel_size up to {MAX_KERNEL_SIZE}, got {kind.kernel_size}"
    if kind.dtype == torch.float64 and isinstance(library(torch.float64), str):
        return f"it has no fp64 form: {library(torch.float64)}"
    return None


def forward(
    query: Tensor,
    key: Tensor | None,
    value: Tensor,
    rel_row: Tensor | None,
    rel_col: Tensor | None,
    options: AttentionOptions,
    pooled: bool = False,
) -> tuple[Tensor, Tensor]:
    """See `interface.Backend.forward`; `out` has query's layout.

    With `pooled`, H and W even, `out` is the average of each 2 x 2 block, (B, N, D, H/2, W/2).

    Raises:
        ValueError: `pooled`, and an odd side.
        MemoryError: there is none for the scratch.
    """
    b, n, d, h, w = query.shape
    size = _output_size(h, w, pooled)
    out = empty_map(query, (n, d), size)
    q, k, v, rows, cols = (_widen(x) for x in (query, key, value, rel_row, rel_col))
    wide_out = out if out.dtype == q.dtype else empty_map(q, (n, d), size)
    lse = q.new_empty((b, n, h, w))
    if query.numel():
        _attend(q, k, v, rows, cols, wide_out, lse, options, pooled)
    return (out if wide_out is out else out.copy_(wide_out)), lse


def backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor | None,
    value: Tensor,
    rel_row: Tensor | None,
    rel_col: Tensor | None,
    out: Tensor | None,
    lse: Tensor,
    options: AttentionOptions,
    into: Targets | None = None,
    pooled: bool = False,
) -> Gradients:
    """See `interface.Backend.backward`. With `pooled`, grad_out is that of the averages, and `out` is not needed.

    Raises:
        MemoryError: there is none for the scratch.
    """
    _output_size(*query.shape[-2:], pooled)
    targets = into or tuple(None if x is None else empty_like_map(query) for x in (query, key, value))
    g, q, k, v, rows, cols, o = (_widen(x) for x in (grad_out, query, key, value, rel_row, rel_col, out))
    wide = tuple(t if t is None or t.dtype == q.dtype else empty_like_map(q) for t in targets)
    wide_rel = tuple(None if x is None else x.new_zeros(x.shape) for x in (rows, cols))
    if query.numel():
        grads = (g, *wide, *wide_rel)
        _attend(q, k, v, rows, cols, o, lse.to(q.dtype).contiguous(), options, pooled, grads)
    for target, source in zip(targets, wide, strict=True):
        if target is not source:
            target.copy_(source)
    return *targets, *(None if x is None else x.to(query.dtype) for x in wide_rel)


# With the projection inside -------------------------------------------------------------------------------------------


def project_and_attend(
    x: Tensor,
    weight: Tensor,
    rel_row: Tensor | None,
    rel_col: Tensor | None,
    num_heads: int,
    options: AttentionOptions,
    pooled: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of query, key and value that the kernel itself makes of the layer's input, row by row.

    Args:
        x: (B, C, H, W) of fp32 or fp64, channels innermost.
        weight: (P, N * D, C), of query, key (P = 3; 2 without) and value.
        rel_row, rel_col, options, pooled: as for `forward`.
        num_heads: N.
        keep: for a backward.

    Returns:
        out as of `forward`, in the layout of x; with `keep` also the log-sum-exp (B, N, H, W) and the three maps in the
        kernel's own order, P * B * N * D * H * W numbers for `projected_backward`; else two empty tensors.

    Raises:
        MemoryError: there is none for the scratch.
    """
    (b, _, h, w), (parts, channels, inputs) = x.shape, weight.shape
    out, lse, kept = empty_projected(x, channels, num_heads, parts, pooled, keep)
    if out.numel():
        weight = weight.contiguous()
        call = _call(
            (b, num_heads, channels // num_heads, h, w), options, pooled, rel_row, rel_col,
            out=_strided(_Map, out), lse=_strided(_Map, lse.unsqueeze(2) if keep else None),
            input=_strided(_Map, x.unsqueeze(1)), weight=_address(weight), inputs=inputs, parts=parts,
            kept=_address(kept if keep else None),
        )  # fmt: skip
        _run(call, x.dtype, options.scale, backward=False)
    return out, lse, kept


def empty_projected(
    x: Tensor, channels: int, num_heads: int, parts: int, pooled: bool, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """What `project_and_attend` fills and returns."""
    b, _, h, w = x.shape
    out = empty_inner_map(x, (num_heads, channels // num_heads), _output_size(h, w, pooled))
    lse = x.new_empty((b, num_heads, h, w) if keep else 0)
    return out, lse, x.new_empty(parts * b * channels * h * w if keep else 0)


def projected_backward(
    grad_out: Tensor,
    kept: Tensor,
    rel_row: Tensor | None,
    rel_col: Tensor | None,
    out: Tensor | None,
    lse: Tensor,
    parts: int,
    options: AttentionOptions,
    pooled: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of the projection (B, P, N, D, H, W), channels innermost, and of rel_row and rel_col.

    Args:
        grad_out, rel_row, rel_col, out, lse, options, pooled: as for `backward`.
        kept: of `project_and_attend`.
        parts: P.

    Raises:
        MemoryError: there is none for the scratch.
    """
    (b, n, d), (h, w) = grad_out.shape[:3], lse.shape[2:]
    grad = empty_inner_map(grad_out, (parts, n, d), (h, w))
    grad_row, grad_col = (None if x is None else torch.zeros_like(x, memory_format=torch.contiguous_format)
                          for x in (rel_row, rel_col))  # fmt: skip
    if grad.numel():
        query, *key, value = grad.unbind(1)
        call = _call(
            (b, n, d, h, w), options, pooled, rel_row, rel_col,
            out=_strided(_Map, out), lse=_strided(_Map, lse.unsqueeze(2)), grad_out=_strided(_Map, grad_out),
            grad_query=_strided(_Map, query), grad_key=_strided(_Map, key[0] if key else None),
            grad_value=_strided(_Map, value), grad_row=_address(grad_row), grad_col=_address(grad_col),
            kept=_address(kept), parts=parts,
        )  # fmt: skip
        _run(call, kept.dtype, options.scale, backward=True)
    return grad, grad_row, grad_col


def _output_size(height: int, width: int, pooled: bool) -> tuple[int, int]:
    """Of an output; the kernel itself checks nothing.

    Raises:
        ValueError: 2 x 2 blocks do not cover the map.
    """
    if not pooled:
        return height, width
    if height % 2 or width % 2:
        raise ValueError(f"2 x 2 blocks do not cover a map of {height} x {width}")
    return height // 2, width // 2


def _widen(x: Tensor | None) -> Tensor | None:
    return x.float() if x is not None and x.dtype in (torch.bfloat16, torch.float16) else x


# The C interface -----------------------------------------------------------------------------------------------------

_Int = ctypes.c_int64
_Map = _Int * 6  # address, strides in elements of (B, N, D, H, W)
_Embedding = _Int * 4  # address, strides in elements of (N, D/2, K)


class AttentionCall(ctypes.Structure):
    """struct AttentionCall of csrc/frame.h, field by field; an address of 0 stands for an absent tensor."""

    _fields_ = (
        *((name, _Int) for name in ("batch", "heads", "width", "height", "columns", "window", "zero_border")),
        *((name, _Int) for name in ("pooled", "threads", "parallel")),
        *((name, _Map) for name in ("query", "key", "value", "out", "lse")),
        *((name, _Embedding) for name in ("rel_row", "rel_col")),
        *((name, _Map) for name in ("grad_out", "grad_query", "grad_key", "grad_value")),
        *((name, _Int) for name in ("grad_row", "grad_col")),
        ("input", _Map),
        *((name, _Int) for name in ("weight", "inputs", "parts", "kept")),
    )


class StemCall(ctypes.Structure):
    """struct StemCall of stem.cpp, field by field; an address of 0 stands for an absent tensor."""

    _fields_ = (
        *((name, _Int) for name in ("batch", "height", "width", "heads", "depth", "mixtures", "side", "sliding")),
        *((name, _Int) for name in ("zero_border", "threads", "parallel")),
        *((name, _Map) for name in ("image", "out")),
        *((name, _Int) for name in ("forms", "mixture", "weight")),
        ("index", _Map),
        *((name, _Int) for name in ("moments", "signs")),
        *((name, _Map) for name in ("grad_out", "grad_image")),
        *((name, _Int) for name in ("grad_forms", "grad_mixture", "grad_weight", "slopes")),
    )


@functools.cache
def _functions(dtype: torch.dtype) -> tuple[Callable[..., int], Callable[..., int]]:
    """The kernels for fp32 or fp64: of local attention and of the stem."""
    loaded = library(dtype)
    attention, stem = loaded.sasa_local_attention, loaded.sasa_stem
    attention.argtypes = (ctypes.POINTER(AttentionCall), ctypes.c_size_t, ctypes.c_double, ctypes.c_int)
    stem.argtypes = (ctypes.POINTER(StemCall), ctypes.c_size_t, ctypes.c_int)
    return attention, stem


def _check_result(result: int) -> None:
    """The result of a call, as enum Result of csrc/maps.h has it.

    Raises:
        MemoryError: there was none for the scratch.
        RuntimeError: the library has other fields of a call.
    """
    if result == 1:
        raise MemoryError("the CPU kernel could not allocate its scratch memory")
    if result:
        raise RuntimeError("the CPU kernel has another interface than sasa/kernels/cpu.py: the fields of a call differ")


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _strided(kind: type[ctypes.Array], x: Tensor | None) -> ctypes.Array:
    """Address and strides of `x`; zeros for None."""
    return kind() if x is None else kind(x.data_ptr(), *x.stride())


def _attend(
    query: Tensor,
    key: Tensor | None,
    value: Tensor,
    rel_row: Tensor | None,
    rel_col: Tensor | None,
    out: Tensor | None,
    lse: Tensor,
    options: AttentionOptions,
    pooled: bool,
    grads: tuple[Tensor | None, ...] = (None,) * 6,
) -> None:
    """Calls the kernel of local attention: backward where `grads` (of out, then of the five inputs) are given."""
    grad_out, grad_query, grad_key, grad_value, grad_row, grad_col = grads
    call = _call(
        query.shape, options, pooled, rel_row, rel_col,
        query=_strided(_Map, query), key=_strided(_Map, key), value=_strided(_Map, value), out=_strided(_Map, out),
        lse=_strided(_Map, lse.unsqueeze(2)),
        grad_out=_strided(_Map, grad_out), grad_query=_strided(_Map, grad_query),
        grad_key=_strided(_Map, grad_key), grad_value=_strided(_Map, grad_value),
        grad_row=_address(grad_row), grad_col=_address(grad_col),
    )  # fmt: skip
    _run(call, query.dtype, options.scale, grad_out is not None)


def _call(
    shape: tuple[int, ...],
    options: AttentionOptions,
    pooled: bool,
    rel_row: Tensor | None,
    rel_col: Tensor | None,
    **tensors: int | ctypes.Array,
) -> AttentionCall:
    """A call for maps of this shape (B, N, D, H, W); `tensors` are further fields."""
    b, n, d, h, w = shape
    return AttentionCall(
        batch=b, heads=n, width=d, height=h, columns=w,
        window=options.kernel_size, zero_border=options.border == "zero", pooled=pooled,
        threads=torch.get_num_threads(), parallel=_parallel_region(),
        rel_row=_strided(_Embedding, rel_row), rel_col=_strided(_Embedding, rel_col), **tensors,
    )  # fmt: skip


def _run(call: AttentionCall, dtype: torch.dtype, scale: float, backward: bool) -> None:
    """Calls the kernel of local attention.

    Raises:
        MemoryError, RuntimeError: see `_check_result`.
    """
    attention, _ = _functions(dtype)
    _check_result(attention(call, ctypes.sizeof(call), scale, backward))


# The stem (the arguments are those of sasa/kernels/stem.py) ----------------------------------------------------------


StemWeights = tuple[Tensor, Tensor, Tensor]  # forms (N, C, C), mixture (P, M), value_weight (M, N * D, C)


def stem_forward(
    weights: StemWeights,
    x: Tensor,
    window: str,
    border: str,
    out: Tensor,
    index: Tensor | None = None,
    signs: Tensor | None = None,
) -> Tensor | None:
    """Writes `out` (B, N * D, H, W) from x (B, C, H, W), of fp32 or fp64.

    With `index` and `signs` (N * D), `out` is one value of each block, (B, N * D, ceil(H / S), ceil(W / S)): that whose
    product with the channel's sign is the largest, the first of equals. `index` (like it) is that value's place in the
    block, and the mean and variance over the map are returned, (2, N * D) in fp64.
    """
    moments = None if index is None else x.new_zeros((2, out.shape[1]), dtype=torch.float64)
    if out.numel():
        _attend_stem(weights, x, window, border, out=out, index=index, moments=moments, signs=signs)
    return moments


def stem_backward(
    weights: StemWeights,
    x: Tensor,
    window: str,
    border: str,
    grad_out: Tensor,
    grad_x: Tensor | None = None,
    index: Tensor | None = None,
    slopes: Tensor | None = None,
) -> list[Tensor]:
    """Gradients of the weights; that of x is written to `grad_x` unless it is None.

    With `index`, grad_out is of the chosen values; slopes (2, N * D) adds slopes[0] + slopes[1] * value at each pixel.
    """
    grads = [torch.zeros_like(y, memory_format=torch.contiguous_format) for y in weights]
    if grad_out.numel():
        _attend_stem(
            weights, x, window, border, index=index, grad_out=grad_out, grad_x=grad_x, grads=grads, slopes=slopes
        )
    return grads


def _attend_stem(
    weights: StemWeights,
    x: Tensor,
    window: str,
    border: str,
    *,
    out: Tensor | None = None,
    index: Tensor | None = None,
    moments: Tensor | None = None,
    signs: Tensor | None = None,
    grad_out: Tensor | None = None,
    grad_x: Tensor | None = None,
    grads: tuple[Tensor | None, ...] | list[Tensor] = (None,) * 3,
    slopes: Tensor | None = None,
) -> None:
    """Calls the kernel of the stem: backward where `grad_out` is given."""
    forms, mixture, weight = (y.contiguous() for y in weights)
    b, _, h, w = x.shape
    num_heads, (positions, mixtures) = forms.shape[0], mixture.shape

    def by_head(y: Tensor | None) -> ctypes.Array:  # (B, N * D, H, W) as (B, N, D, H, W)
        return _strided(_Map, None if y is None else y.unflatten(1, (num_heads, -1)))

    grad_forms, grad_mixture, grad_weight = grads
    call = StemCall(
        batch=b, height=h, width=w, heads=num_heads, depth=weight.shape[1] // num_heads, mixtures=mixtures,
        side=math.isqrt(positions), sliding=window == "sliding", zero_border=border == "zero",
        threads=torch.get_num_threads(), parallel=_parallel_region(),
        image=_strided(_Map, x.unsqueeze(1)), out=by_head(out),
        forms=_address(forms), mixture=_address(mixture), weight=_address(weight),
        index=by_head(index), moments=_address(moments), signs=_address(signs),
        grad_out=by_head(grad_out), grad_image=_strided(_Map, None if grad_x is None else grad_x.unsqueeze(1)),
        grad_forms=_address(grad_forms), grad_mixture=_address(grad_mixture), grad_weight=_address(grad_weight),
        slopes=_address(slopes),
    )  # fmt: skip
    _, stem = _functions(x.dtype)
    _check_result(stem(call, ctypes.sizeof(call), grad_out is not None))


# Threads -------------------------------------------------------------------------------------------------------------

_LOADED_IN = os.getpid()


def _parallel_region() -> int:
    """Address of GOMP_parallel in the OpenMP runtime that torch uses; 0 where the kernel must start its own threads.

    So in a forked child: the pool of OpenMP threads was not copied, and a parallel region would wait for it forever.
    """
    return _gomp_parallel() if os.getpid() == _LOADED_IN else 0


@functools.cache
def _gomp_parallel() -> int:
    if multiprocessing.parent_process() is not None and multiprocessing.get_start_method(allow_none=True) != "spawn":
        return 0  # a forked process that imported this file after the fork
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return 0
    paths = {line.split(maxsplit=5)[5] for line in lines if "omp" in line and "/" in line}
    torch_folder = str(Path(torch.__file__).parent)
    for path in sorted(paths, key=lambda p: not p.startswith(torch_folder)):
        if Path(path).name.startswith(("libgomp", "libiomp", "libomp")):
            try:
                entry = ctypes.CDLL(path, mode=os.RTLD_NOLOAD | os.RTLD_NOW).GOMP_parallel
            except (OSError, AttributeError):
                continue
            return ctypes.cast(entry, ctypes.c_void_p).value
    return 0
