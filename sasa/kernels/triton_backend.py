"""Backend "triton": local attention as fused Triton kernels for CUDA, forward and backward in linear memory.

This is the host side: what the kernels take, memory layouts, buffers and launches. triton_tiles.py cuts a call into
tiles, the device side is triton_kernels.py, and triton is imported when the first call runs, not before. With
TRITON_INTERPRET=1 set, the same kernels are interpreted on CPU tensors: slow, for checking the mathematics without a
GPU, and only where backend="triton" is named.

Maps with channels innermost (channels_last) and equal strides are read and written in place, slices of a fused
projection by one address for the three; of any other layout one copy is made. Nothing is kept but out and log-sum-exp;
backward adds delta, a number per pixel and head, and one partial sum of the embeddings' gradient per strip of tiles.
Sums have a fixed order: results repeat bit for bit. There is no host synchronisation, so that CUDA graphs can capture a
call.

A number that is not finite stays in the windows that hold it where `triton_tiles.confines` says so; elsewhere it makes
its whole tile NaN.

Shapes: B batch, N heads, D head width, H x W map, K window side. Source: Ramachandran et al. 2019, equation 3.
"""

import contextlib
import functools
import importlib.util
import itertools
import os
import re
import shutil
import sysconfig
from pathlib import Path

import torch
from torch import Tensor

from sasa.kernels import triton_tiles as tiles
from sasa.kernels.interface import AttentionOptions, CallKind, Gradients, Targets, empty_inner_map

MAX_KERNEL_SIZE, MAX_HEAD_DIM = 13, 64
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CAPABILITY = (8, 0)  # the oldest GPUs with bf16 products
TRITON = (3, 3)  # the oldest version with tl.gather
SMALLEST_SCALE = 1e-20  # of logits: times MASKED in triton_kernels.py it still excludes a pair


def interpreted() -> bool:
    """Whether Triton's interpreter is on: the kernels then take CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _cuda_missing() -> str | None:
    if torch.version.hip:
        return "torch is built for ROCm, it needs CUDA"
    if not torch.cuda.is_available():
        return "no CUDA device"
    found = max(torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count()))
    return _too_old(found) or _cannot_launch()


def _cannot_launch() -> str | None:
    """Why Triton could not build what launches its kernels, a C module of this Python; it would raise at the first
    launch."""
    named = os.environ.get("CC")
    if named == "" or (named is None and not shutil.which("gcc") and not shutil.which("clang")):
        return "Triton needs a C compiler to launch kernels: install gcc or clang, or name one by CC"
    scheme = sysconfig.get_default_scheme()
    scheme = "posix_prefix" if scheme == "posix_local" else scheme  # Debian's, where headers are not
    more = os.pathsep.join(os.environ.get(name, "") for name in ("CPATH", "C_INCLUDE_PATH"))
    folders = [sysconfig.get_paths(scheme)["include"], *more.split(os.pathsep)]
    if any(folder and Path(folder, "Python.h").is_file() for folder in folders):
        return None
    return f"Triton needs Python.h to launch kernels, it is not in {folders[0]}: install python3-dev"


def _too_old(capability: tuple[int, int]) -> str | None:
    if capability >= CAPABILITY:
        return None
    return "the GPU has compute capability {}.{}, it needs {}.{}".format(*capability, *CAPABILITY)


def cannot_compile() -> str | None:
    """Why the kernels cannot be compiled or interpreted here (no triton, an old one), or None. Does not import it."""
    spec = importlib.util.find_spec("triton")
    if spec is None:
        return "the package triton is not installed"
    version = _version_in(spec.origin)
    if version >= TRITON:
        return None
    return "triton {}.{} is installed, it needs {}.{} or newer".format(*version, *TRITON)


@functools.cache
def _version_in(file: str) -> tuple[int, int]:
    """The version in triton/__init__.py: the name of the package that brought it differs (triton, pytorch-triton)."""
    found = re.search(r"__version__ = ['\"](\d+)\.(\d+)", Path(file).read_text(encoding="utf-8"))
    return (int(found[1]), int(found[2])) if found else (0, 0)


@functools.cache
def _version() -> str:
    """Of the installed triton."""
    return "{}.{}".format(*_version_in(importlib.util.find_spec("triton").origin))


def unusable() -> str | None:
    """Why the kernels cannot run here (no triton or GPU, or an old one), or None."""
    return cannot_compile() or (None if interpreted() else _cuda_missing())


def unsupported(kind: CallKind) -> str | None:
    """Why the kernels cannot take this call, or None."""
    device = "cpu" if interpreted() else "cuda"
    if kind.device.type != device:
        return f"it takes {device} tensors{' with TRITON_INTERPRET=1' * interpreted()}, got {kind.device.type}"
    if kind.dtype not in DTYPES:
        return f"it takes fp32, bf16 and fp16, got {kind.dtype}"
    if kind.kernel_size > MAX_KERNEL_SIZE:
        return f"kernel_size={kind.kernel_size}: it takes up to {MAX_KERNEL_SIZE}"
    if kind.head_dim > MAX_HEAD_DIM:
        return f"a head width of {kind.head_dim}: it takes up to {MAX_HEAD_DIM}"
    return _too_old(torch.cuda.get_device_capability(kind.device)) if device == "cuda" else None


# Layout --------------------------------------------------------------------------------------------------------------


def _is_inner(x: Tensor) -> bool:
    """Channels have stride 1 and heads stride D: what the kernels read and write."""
    _, n, d, _, _ = x.shape
    return (d == 1 or x.stride(2) == 1) and (n == 1 or x.stride(1) == d)


def _empty_inner(x: Tensor) -> Tensor:
    return empty_inner_map(x, x.shape[1:3], x.shape[3:])


def _inner(x: Tensor) -> Tensor:
    """x, or a copy with channels innermost."""
    return x if _is_inner(x) else _empty_inner(x).copy_(x)


def _strides(x: Tensor) -> tuple[int, int, int]:
    """Of B, H and W; 0 along an axis of one, whose stride may be any number."""
    return tuple(0 if x.shape[axis] == 1 else x.stride(axis) for axis in (0, 3, 4))


def _alike(*maps: Tensor | None) -> list[Tensor | None]:
    """The maps with channels innermost and the same strides, so that one set of offsets serves them; else copies."""
    found = [None if x is None else _inner(x) for x in maps]
    if len({_strides(x) for x in found if x is not None}) > 1:
        found = [None if x is None else _empty_inner(x).copy_(x) for x in found]
    return found


def _follow(*maps: Tensor | None) -> bool:
    """Whether each map lies N * D elements behind the one before it, with the same strides."""
    present = [x for x in maps if x is not None]
    step = present[0].shape[1] * present[0].shape[2] * present[0].element_size()
    return all(
        y.data_ptr() - x.data_ptr() == step and _strides(x) == _strides(y) for x, y in itertools.pairwise(present)
    )


def _room(maps: tuple[Tensor | None, ...], targets: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    """Where to write gradients of `maps`: the targets if the kernels can write there, else new maps."""
    fits = all(x is None or (y is not None and _is_inner(y)) for x, y in zip(maps, targets, strict=True))
    if fits and len({_strides(y) for x, y in zip(maps, targets, strict=True) if x is not None}) <= 1:
        return [None if x is None else y for x, y in zip(maps, targets, strict=True)]
    return [None if x is None else _empty_inner(x) for x in maps]


# Launches ------------------------------------------------------------------------------------------------------------


def device(x: Tensor) -> contextlib.AbstractContextManager:
    """A context in which the device of x is the current one, on which Triton launches."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext()


def load() -> None:
    """Before the first launch: repairs the interpreter where it is on."""
    if interpreted():
        from sasa.kernels import triton_interpreter

        triton_interpreter.repair()


def compiler_options() -> dict[str, bool]:
    """Of every launch. Products and sums are fused, whatever the version's default."""
    return {} if interpreted() else {"enable_fp_fusion": True}


@functools.cache
def _kernels():
    """The device side, on first use."""
    from sasa.kernels import triton_gradients, triton_kernels

    load()
    return {
        "forward": triton_kernels.forward_kernel,
        "query": triton_gradients.query_kernel,
        "key": triton_gradients.key_kernel,
    }


def _target(query: Tensor) -> str | None:
    """What a kernel is compiled for, as the table names it; None for the interpreter."""
    if query.device.type != "cuda":
        return None
    major, minor = torch.cuda.get_device_capability(query.device)
    return f"{_version()} {10 * major + minor}"


def _confines(stage: str, problem: tiles.Problem, dtype: torch.dtype, target: str | None) -> bool:
    """Whether the kernel keeps NaN in its windows; the interpreter's, which costs no instructions, always do."""
    if target is None:
        return True
    row = tiles.row_of(stage, problem, dtype)
    if " map4 " in row and not tiles.is_clamped(stage, problem):  # another program than the one that was counted
        return False
    return tiles.confines(stage, row, target)


def _launch(
    stage: str, problem: tiles.Problem, query: Tensor, arguments: tuple, strides: tuple, numbers: tuple
) -> None:
    """Runs a kernel over the batch; `arguments` are its tensors, `numbers` what follows the map's sizes.

    Raises:
        ValueError: a size is beyond the kernels' limits.
    """
    target, batch = _target(query), query.shape[0]
    tile = tiles.tile_of(stage, problem, query.dtype, target)
    tiles_h, tiles_w = -(-problem.height // tile[0]), -(-problem.width // tile[1])
    heads = 1 if stage == "query" else tiles.heads_per_program(problem.num_heads, batch * tiles_h * tiles_w)
    constant = tiles.constants(stage, tile, problem, query.dtype, heads, _confines(stage, problem, query.dtype, target))
    reason = tiles.exceeded(constant, problem, strides)
    if reason is not None:
        raise ValueError(f"backend='triton' does not take this call: {reason}")
    strips = -(-tiles_h // tiles.STRIP)
    kernel = _kernels()[stage]
    options = constant | {"num_warps": tile[3], "num_stages": 1} | compiler_options()
    rows = strips if stage == "query" else tiles_h
    sizes = (tiles_h, strips) if stage == "query" else ()
    with device(query):
        for first in range(0, batch, tiles.MAX_GRID):
            grid = (problem.num_heads // heads * tiles_w, rows, min(batch - first, tiles.MAX_GRID))
            kernel[grid](*arguments, *strides, first, problem.height, problem.width, *sizes, *numbers, **options)


def _positive(query: Tensor, scale: float) -> tuple[Tensor, float]:
    """The same logits with a scale that the kernels take: 0 and negative ones go into the query."""
    return (query, scale) if scale >= SMALLEST_SCALE else (query * scale, 1.0)


def _problem(
    query: Tensor, key: Tensor | None, rel_row: Tensor | None, options: AttentionOptions, fused: bool
) -> tiles.Problem:
    _, n, d, h, w = query.shape
    return tiles.Problem(
        n, d, h, w, options.kernel_size, options.border == "mask", key is not None, rel_row is not None, fused
    )


# Passes --------------------------------------------------------------------------------------------------------------


def forward(
    query: Tensor,
    key: Tensor | None,
    value: Tensor,
    rel_row: Tensor | None,
    rel_col: Tensor | None,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor]:
    """See `interface.Backend.forward`; `out` has channels innermost.

    Raises:
        ValueError: a size is beyond the kernels' limits.
    """
    query, scale = _positive(query, options.scale)
    query, key, value = _alike(query, key, value)
    rel_row, rel_col = (None if x is None else x.contiguous() for x in (rel_row, rel_col))
    b, n, _, h, w = query.shape
    out, lse = _empty_inner(query), query.new_empty((b, n, h, w), dtype=torch.float32)
    if out.numel():
        problem = _problem(query, key, rel_row, options, _follow(query, key, value))
        maps = (query, *((None, None) if problem.fused else (key, value)))
        strides = (*_strides(query), *_strides(out))
        _launch("forward", problem, query, (*maps, rel_row, rel_col, out, lse), strides, (scale,))
    return out, lse


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

    Raises:
        ValueError: a size is beyond the kernels' limits.
    """
    query, scale = _positive(query, options.scale)
    grad_out, out = _inner(grad_out), _inner(out)
    query, key, value = _alike(query, key, value)
    rel_row, rel_col = (None if x is None else x.contiguous() for x in (rel_row, rel_col))
    lse = lse.contiguous()
    b, n, d, h, w = query.shape
    targets = (None,) * 3 if into is None else into
    (grad_query,) = _room((query,), targets[:1])
    grad_key, grad_value = _room((key, value), targets[1:])
    delta = torch.empty_like(lse)
    problem = _problem(query, key, rel_row, options, _follow(query, key, value))
    tile_h, tile_w, *_ = tiles.tile_of("query", problem, query.dtype, _target(query))
    partial = None
    if rel_row is not None:
        strips = (b, -(-h // (tile_h * tiles.STRIP)), -(-w // tile_w))
        partial = query.new_empty((*strips, n, d, options.kernel_size), dtype=torch.float32)
    if query.numel():
        maps = (grad_out, query, *((None, None) if problem.fused else (key, value)), rel_row, rel_col)
        read = (*_strides(grad_out), *_strides(query))
        strides = (*read, *_strides(out), *_strides(grad_query))
        _launch("query", problem, query, (*maps, out, lse, delta, grad_query, partial), strides, (scale,))
        problem = problem._replace(fused=problem.fused and _follow(grad_key, grad_value))
        maps = (grad_out, query, *((None, None) if problem.fused else (key, value)), rel_row, rel_col)
        grads = (grad_key, None) if problem.fused and problem.content else (grad_key, grad_value)
        _launch("key", problem, query, (*maps, lse, delta, *grads), (*read, *_strides(grad_value)), (scale,))
    if scale != options.scale:
        grad_query *= options.scale
    grad_row = grad_col = None
    if partial is not None:
        grad_row, grad_col = partial.sum((0, 1, 2)).to(rel_row.dtype).chunk(2, 1)  # (N, D/2, K) each
    grads = (grad_query, grad_key, grad_value)
    grads = [y.copy_(x) if y is not None and y is not x else x for x, y in zip(grads, targets, strict=True)]
    return *grads, grad_row, grad_col
