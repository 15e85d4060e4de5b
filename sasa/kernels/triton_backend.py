"""Backend "triton": local attention as fused Triton kernels for CUDA, forward and backward in linear memory.

This is the host side: what the kernels take, how a call is cut into tiles, buffers and launches. The device side is
triton_kernels.py, and triton is imported when the first call runs, not before. With TRITON_INTERPRET=1 set,
the same kernels are interpreted on CPU tensors: slow, for checking the mathematics without a GPU, and only where
backend="triton" is asked for by name.

Maps with channels innermost (channels_last), slices of a fused projection among them, are read and written in place; of
any other layout one copy is made. Nothing is kept but out and log-sum-exp; backward adds delta, a number per pixel and
head, and one partial sum of the embeddings' gradient per strip of tiles. Sums have a fixed order: results repeat bit
for bit. There is no host synchronisation, so that CUDA graphs can capture a call.

A number that is not finite makes its whole tile NaN, not only the windows that hold it.

Shapes: B batch, N heads, D head width, H x W map, K window side. Source: Ramachandran et al. 2019, equation 3.
"""

import contextlib
import functools
import importlib.util
import json
import os
import re
from pathlib import Path

import torch
from torch import Tensor

from sasa.kernels.interface import AttentionOptions, CallKind

TABLE = Path(__file__).with_name("triton_table.json")  # written by `python -m sasa.kernels.tune`
STAGES = ("forward", "query", "key")  # the kernels; the last two are the backward
MAX_KERNEL_SIZE, MAX_HEAD_DIM = 13, 64
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CAPABILITY = (8, 0)  # the oldest GPUs with bf16 products
TRITON = (3, 3)  # the oldest version with tl.gather
STRIP = 8  # tiles of a strip: long enough that partial sums are small, short enough to fill the GPU


def interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _cuda_missing() -> str | None:
    if torch.version.hip:
        return "torch is built for ROCm, it needs CUDA"
    if not torch.cuda.is_available():
        return "no CUDA device"
    found = max(torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count()))
    return _too_old(found)


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


# Tiles ---------------------------------------------------------------------------------------------------------------

Tile = tuple[int, int, int, int]  # rows and columns of the tile, rows of a chunk of its patch, warps


@functools.cache
def table() -> dict[str, dict]:
    return json.loads(TABLE.read_text())["tiles"]


def bucket(value: int, bounds: tuple[int, ...]) -> int:
    """The smallest bound that `value` does not exceed, else the largest."""
    return next((bound for bound in bounds if value <= bound), bounds[-1])


# The table's rows; 56: and larger. fp32 is there to be right, not fast, and has one tile for all maps.
WINDOWS, WIDTHS, SIDES = (3, 5, 7, 13), (16, 32, 64), {"half": (4, 8, 16, 56), "float": (56,)}


def table_key(kernel_size: int, head_dim: int, side: int, dtype: torch.dtype) -> str:
    """The row of the table for a map whose longer side is `side`."""
    kind = "float" if dtype == torch.float32 else "half"
    sizes = bucket(kernel_size, WINDOWS), bucket(head_dim, WIDTHS), bucket(side, SIDES[kind])
    return "K{} d{} map{} {}".format(*sizes, kind)


def _power(value: int) -> int:
    return 1 << (value - 1).bit_length()


def constants(
    stage: str, tile: Tile, kernel_size: int, shape: tuple[int, int, int], mask: bool, content: bool, relative: bool
) -> dict[str, int]:
    """What a kernel is compiled for; shape = (D, H, W)."""
    head_dim, height, width = shape
    tile_h, tile_w, rows, _ = tile
    span_h, span_w = tile_h + kernel_size - 1, tile_w + kernel_size - 1
    if mask or stage == "key":  # the patch need not reach over the border
        span_h, span_w = min(span_h, height), min(span_w, width)
    rows = min(rows, _power(span_h))
    patch_w = max(_power(span_w), 16 // rows)  # a product takes 16 pixels at least
    found = {
        "K": kernel_size, "D": head_dim, "DP": max(_power(head_dim), 16), "TH": tile_h, "TW": tile_w,
        "ROWS": rows, "PW": patch_w, "CHUNKS": -(-span_h // rows), "MASK": mask, "CONTENT": content,
        "RELATIVE": relative, "STRIP": STRIP,
    }  # fmt: skip
    leave_out = {"forward": ("STRIP",), "query": (), "key": ("MASK", "STRIP")}[stage]
    return {name: value for name, value in found.items() if name not in leave_out}


def _cut(stage: str, query: Tensor, key, rel_row, kernel_size: int, border: str) -> tuple[int, int, dict]:
    """Rows and columns of tiles, and the keywords of the launch."""
    tile = tuple(table()[table_key(kernel_size, query.shape[2], max(query.shape[3:]), query.dtype)][stage]["tile"])
    found = constants(
        stage, tile, kernel_size, tuple(query.shape[2:]), border == "mask", key is not None, rel_row is not None
    )
    launch = found | {"num_warps": tile[3], "num_stages": 1}
    return -(-query.shape[3] // tile[0]), -(-query.shape[4] // tile[1]), launch


# Layout --------------------------------------------------------------------------------------------------------------


def _is_inner(x: Tensor) -> bool:
    """Channels have stride 1 and heads stride D: what the kernels read and write."""
    _, n, d, _, _ = x.shape
    return (d == 1 or x.stride(2) == 1) and (n == 1 or x.stride(1) == d)


def _empty_inner(x: Tensor) -> Tensor:
    b, n, d, h, w = x.shape
    return x.new_empty((b, h, w, n, d)).permute(0, 3, 4, 1, 2)


def _inner(x: Tensor | None) -> Tensor | None:
    """x, or a copy with channels innermost."""
    return x if x is None or _is_inner(x) else _empty_inner(x).copy_(x)


def _strides(*maps: Tensor | None) -> tuple[int, ...]:
    """Of B, H and W, map by map; an absent map is not read."""
    return tuple(stride for x in maps for stride in ((0, 0, 0) if x is None else (x.stride(0), *x.stride()[3:])))


def _device(x: Tensor):
    """Triton launches on the current device."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext()


@functools.cache
def _kernels():
    """The device side, on first use."""
    from sasa.kernels import triton_kernels as cuda_kernels

    if interpreted():
        from sasa.kernels import triton_interpreter as interpreter

        interpreter.repair()
    return cuda_kernels


# Passes --------------------------------------------------------------------------------------------------------------


def forward(query, key, value, rel_row, rel_col, *options) -> tuple[Tensor, Tensor]:
    """-> out (B, N, D, H, W) in the input's dtype, channels innermost; log-sum-exp of the logits (B, N, H, W), fp32."""
    kernel_size, border, scale = AttentionOptions(*options)
    query, key, value = (_inner(x) for x in (query, key, value))
    rel_row, rel_col = (None if x is None else x.contiguous() for x in (rel_row, rel_col))
    b, n, _, h, w = query.shape
    out, lse = _empty_inner(query), query.new_empty((b, n, h, w), dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    tiles_h, tiles_w, launch = _cut("forward", query, key, rel_row, kernel_size, border)
    with _device(query):
        _kernels().forward_kernel[(b * tiles_h * tiles_w * n,)](
            query, key, value, rel_row, rel_col, out, lse, *_strides(query, key, value, out),
            n, h, w, tiles_h, tiles_w, scale, **launch,
        )  # fmt: skip
    return out, lse


def backward(grad_out, query, key, value, rel_row, rel_col, out, lse, *options, into=None):
    """Gradients of query, key, value, rel_row, rel_col (None where the input is None)."""
    kernel_size, border, scale = AttentionOptions(*options)
    grad_out, query, key, value, out = (_inner(x) for x in (grad_out, query, key, value, out))
    rel_row, rel_col = (None if x is None else x.contiguous() for x in (rel_row, rel_col))
    lse = lse.contiguous()
    b, n, d, h, w = query.shape
    targets = (None,) * 3 if into is None else into
    present = (query, key, value)
    maps = [
        None if x is None else target if target is not None and _is_inner(target) else _empty_inner(x)
        for x, target in zip(present, targets, strict=True)
    ]
    grad_query, grad_key, grad_value = maps
    delta = torch.empty_like(lse)
    tiles_h, tiles_w, launch = _cut("query", query, key, rel_row, kernel_size, border)
    strips = -(-tiles_h // STRIP)
    partial = None
    if rel_row is not None:
        partial = query.new_empty((b, strips, tiles_w, n, d, kernel_size), dtype=torch.float32)
    if query.numel():
        device_side = _kernels()
        with _device(query):
            device_side.query_kernel[(b * strips * tiles_w * n,)](
                grad_out, query, key, value, rel_row, rel_col, out, lse, delta, grad_query, partial,
                *_strides(grad_out, query, key, value, out, grad_query),
                n, h, w, tiles_h, tiles_w, strips, scale, **launch,
            )  # fmt: skip
            tiles_h, tiles_w, launch = _cut("key", query, key, rel_row, kernel_size, border)
            device_side.key_kernel[(b * tiles_h * tiles_w * n,)](
                grad_out, query, key, value, rel_row, rel_col, lse, delta, grad_key, grad_value,
                *_strides(grad_out, query, key, value, grad_key, grad_value),
                n, h, w, tiles_h, tiles_w, scale, **launch,
            )  # fmt: skip
    grad_row = grad_col = None
    if partial is not None:
        grad_row, grad_col = partial.sum((0, 1, 2)).to(rel_row.dtype).chunk(2, 1)  # (N, D/2, K) each
    maps = [
        target.copy_(x) if target is not None and target is not x else x
        for x, target in zip(maps, targets, strict=True)
    ]
    return *maps, grad_row, grad_col
