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
from pathlib import Path

import torch
from torch import Tensor

from sasa.kernels import empty_like_map
from sasa.kernels.build import library

MAX_KERNEL_SIZE = 13  # kMaxWindow of cpu.cpp
STEM_CHANNELS = 3  # C of stem.cpp
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def unusable() -> str | None:
    """Why the kernel cannot run here (no compiler, a failed build), or None. The first call builds or loads it."""
    found = library(torch.float32)
    return found if isinstance(found, str) else None


def unsupported(query: Tensor, kernel_size: int) -> str | None:
    """Why the kernel cannot take this call, or None."""
    if query.device.type != "cpu":
        return f"it takes CPU tensors, got {query.device.type}"
    if query.dtype not in DTYPES:
        return f"it takes fp32, fp64, bf16 and fp16, got {query.dtype}"
    if kernel_size > MAX_KERNEL_SIZE:
        return f"it takes kernel_size up to {MAX_KERNEL_SIZE}, got {kernel_size}"
    if query.dtype == torch.float64 and isinstance(library(torch.float64), str):
        return f"it has no fp64 form: {library(torch.float64)}"
    return None


def forward(query, key, value, rel_row, rel_col, kernel_size: int, border: str, scale: float) -> tuple[Tensor, Tensor]:
    """-> out (B, N, D, H, W) in query's dtype and layout, log-sum-exp of the logits (B, N, H, W) in fp32 or fp64."""
    out = empty_like_map(query)
    q, k, v, rows, cols = (_widen(x) for x in (query, key, value, rel_row, rel_col))
    wide_out = out if out.dtype == q.dtype else empty_like_map(q)
    b, n, _, h, w = query.shape
    lse = q.new_empty((b, n, h, w))
    if query.numel():
        _call(False, (q, k, v, wide_out, lse, rows, cols), (), kernel_size, border, scale)
    return (out if wide_out is out else out.copy_(wide_out)), lse


def backward(
    grad_out, query, key, value, rel_row, rel_col, out, lse, kernel_size: int, border: str, scale: float, into=None
):
    """Gradients of query, key, value, rel_row, rel_col (None where the input is None).

    into: (query's, key's or None, value's) tensors of any strides to write instead of new ones.
    """
    targets = into or tuple(None if x is None else empty_like_map(query) for x in (query, key, value))
    g, q, k, v, rows, cols, o = (_widen(x) for x in (grad_out, query, key, value, rel_row, rel_col, out))
    wide = tuple(t if t is None or t.dtype == q.dtype else empty_like_map(q) for t in targets)
    wide_rel = tuple(None if x is None else x.new_zeros(x.shape) for x in (rows, cols))
    if query.numel():
        grads = (g, *wide, *wide_rel)
        _call(True, (q, k, v, o, lse.to(q.dtype).contiguous(), rows, cols), grads, kernel_size, border, scale)
    for target, source in zip(targets, wide, strict=True):
        if target is not source:
            target.copy_(source)
    return *targets, *(None if x is None else x.to(query.dtype) for x in wide_rel)


def _widen(x: Tensor | None) -> Tensor | None:
    return x.float() if x is not None and x.dtype in (torch.bfloat16, torch.float16) else x


def _call(backward: bool, inputs, grads, kernel_size: int, border: str, scale: float) -> None:
    """Calls the kernel; the order of the numbers is that of struct Call in cpu.cpp."""
    query, key, value, out, lse, rel_row, rel_col = inputs
    b, n, d, h, w = query.shape
    fields = [b, n, d, h, w, kernel_size, border == "zero", torch.get_num_threads(), _parallel_region()]
    for x in (query, key, value, out):
        fields += (0,) * 6 if x is None else (x.data_ptr(), *x.stride())
    fields += (lse.data_ptr(), n * h * w, h * w, 0, w, 1)
    for x in (rel_row, rel_col):
        fields += (0,) * 4 if x is None else (x.data_ptr(), *x.stride())
    for x in grads[:4]:
        fields += (0,) * 6 if x is None else (x.data_ptr(), *x.stride())
    for x in grads[4:]:
        fields.append(0 if x is None else x.data_ptr())
    loaded = library(query.dtype)
    if loaded.sasa_local_attention(loaded.record(*fields), scale, backward):
        raise MemoryError("the CPU kernel could not allocate its scratch memory")


# ---------------------------------------------------------------------------------------------------------------------
# The stem (the arguments are those of kernels/stem.py)


def stem_forward(weights, x, window: str, border: str, out: Tensor, index: Tensor | None = None):
    """Writes `out` (B, N * D, H, W), of fp32 or fp64.

    With `index`, `out` is the largest value of each block (B, N * D, ceil(H / S), ceil(W / S)), `index` (like it) that
    value's place in the block, and the mean and variance over the map are returned, (2, N * D) in fp64.
    """
    moments = None if index is None else x.new_zeros((2, out.shape[1]), dtype=torch.float64)
    if out.numel():
        _call_stem(weights, x, window, border, out=out, index=index, moments=moments)
    return moments


def stem_backward(weights, x, window: str, border: str, grad_out, grad_x=None, index=None, slopes=None):
    """Gradients of the weights; that of x is written to `grad_x` unless it is None.

    With `index`, grad_out is of the largest values; slopes (2, N * D) adds slopes[0] + slopes[1] * value at each pixel.
    """
    grads = [torch.zeros_like(y, memory_format=torch.contiguous_format) for y in weights]
    if grad_out.numel():
        _call_stem(weights, x, window, border, None, index, None, grad_out, grad_x, grads, slopes)
    return grads


def _call_stem(
    weights, x, window, border, out=None, index=None, moments=None, grad_out=None, grad_x=None, grads=(None,) * 3,
    slopes=None,
) -> None:  # fmt: skip
    """Calls the kernel; the order of the numbers is that of struct Call in stem.cpp."""
    forms, mixture, weight = weights = [y.contiguous() for y in weights]
    b, _, h, w = x.shape
    num_heads, (positions, mixtures) = forms.shape[0], mixture.shape
    depth, side = weight.shape[1] // num_heads, math.isqrt(positions)
    fields = [b, h, w, num_heads, depth, mixtures, side, window == "sliding", border == "zero"]
    fields += [torch.get_num_threads(), _parallel_region()]

    def add_map(y: Tensor | None, channels: int) -> None:  # as (B, heads, channels, H, W)
        batch, channel, *rest = (0,) * 4 if y is None else y.stride()
        fields.extend((0 if y is None else y.data_ptr(), batch, channels * channel, channel, *rest))

    def add(*tensors: Tensor | None) -> None:
        fields.extend(0 if y is None else y.data_ptr() for y in tensors)

    add_map(x, 0)
    add_map(out, depth)
    add(*weights)
    add_map(index, depth)
    add(moments)
    add_map(grad_out, depth)
    add_map(grad_x, 0)
    add(*grads, slopes)
    loaded = library(x.dtype)
    if loaded.sasa_stem(loaded.stem_record(*fields), grad_out is not None):
        raise MemoryError("the CPU kernel could not allocate its scratch memory")


# ---------------------------------------------------------------------------------------------------------------------
# Threads


@functools.cache
def _parallel_region() -> int:
    """Address of GOMP_parallel in the OpenMP runtime that torch uses; 0 where the kernel must start its own threads."""
    if multiprocessing.parent_process() is not None and multiprocessing.get_start_method(allow_none=True) != "spawn":
        return 0  # a forked process: see _forget_threads
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


def _forget_threads() -> None:
    """In a forked child: the pool of OpenMP threads was not copied, and a parallel region would wait for it forever."""
    global _parallel_region
    _parallel_region = int


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)
