"""Builds of the Triton kernels for GPUs that need not be here: compiled, disassembled, and their instructions counted.

Nothing is run and nothing is timed. Executed instructions are those of the disassembly, its loops multiplied by their
known trips. Shapes as in triton_kernels.py.
"""

import collections
import dataclasses
import functools
import re
import subprocess
import tempfile
from pathlib import Path

import torch

from sasa.kernels import triton_tiles as tiles

POINTER = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
WIDE = ("lse", "delta", "partial")  # buffers in fp32 whatever the maps are
WARP_REGISTERS, WARPS, SHARED = 65536 // 32, 64, 227 * 1024  # of a multiprocessor of compute capability 9.0


@dataclasses.dataclass(frozen=True)
class Build:
    """What a compiled kernel needs. Instructions are executed warp instructions, of local attention a tile and head."""

    registers: int
    stack: int  # bytes a thread; above 0 is a spill
    shared: int  # bytes
    instructions: dict[str, float]  # by the first word of the operation, and "all"
    widest_load: int  # bytes a thread
    atomics: int  # in the PTX


def triton_version() -> str:
    """Major and minor version of the installed triton."""
    import triton

    return ".".join(triton.__version__.split(".")[:2])


def warps_resident(registers: int, shared: int, warps: int) -> int:
    """Warps that a multiprocessor of compute capability 9.0 holds at once, of programs of `warps`."""
    per_warp = -(-registers // 8) * 8
    programs = min(WARP_REGISTERS // (per_warp * warps), SHARED // (shared + 1024), WARPS // warps)
    return programs * warps


def compile_stage(
    stage: str,
    tile: tiles.TileConfig,
    problem: tiles.Problem,
    dtype: torch.dtype,
    *,
    capability: int = 90,
    heads: int = 8,
    confine: bool = False,
) -> Build:
    """Compiles a kernel of triton_kernels.py for a compute capability, times ten.

    Args:
        stage: one of `tiles.STAGES`.
        tile: how the kernel cuts its map.
        problem: what it is compiled for, channels innermost and aligned.
        dtype: of the maps.
        capability: 80, 90, 100, ...
        heads: of a program, a divisor of problem.num_heads; the query kernel serves one.
        confine: see `triton_tiles.confines`; what runs only after a NaN is not counted.
    """
    heads = 1 if stage == "query" else heads
    constant = tiles.constants(stage, tile, problem, dtype, heads, confine)
    absent = set()
    if problem.fused:
        absent |= {"key", "value"} | ({"grad_value"} if problem.content else set())
    if not problem.content:
        absent |= {"key", "grad_key"}
    if not problem.relative:
        absent |= {"rel_row", "rel_col", "partial"}
    loop_trips = trips(stage, constant, heads)
    built = _compile(stage, tuple(constant.items()), frozenset(absent), dtype, tile[3], capability, loop_trips)
    outer = tiles.STRIP if stage == "query" else heads
    per_tile = {name: count / outer for name, count in built.instructions.items()}
    return dataclasses.replace(built, instructions=per_tile)


@functools.cache  # maps of several sizes have the same build
def _compile(
    stage: str,
    constants: tuple[tuple[str, int], ...],
    absent: frozenset[str],
    dtype: torch.dtype,
    warps: int,
    capability: int,
    loop_trips: tuple[int, ...],
) -> Build:
    from sasa.kernels import triton_gradients, triton_kernels, triton_parts

    function = getattr(triton_kernels if stage == "forward" else triton_gradients, f"{stage}_kernel")
    kernel = _source(function, dict(constants), absent & set(function.arg_names), triton_parts.SIZES, dtype)
    return _build(kernel, warps, capability, loop_trips)


@functools.cache
def compile_stem(stage: str, form: str, *, capability: int = 90) -> Build:
    """Compiles a kernel of triton_stem_kernels.py for the stem of `ResNet`: 4 heads of 16, windows of 4 x 4.

    Args:
        stage: "forward" or "backward".
        form: "pooled" or "block", with 4 mixtures, or "sliding", with 16.
        capability: compute capability, times ten.
    """
    from sasa.kernels import triton_stem, triton_stem_kernels

    sliding = form == "sliding"
    mixtures = 16 if sliding else 4
    sizes = triton_stem.Sizes.of((1, 3, 224, 224), heads=4, depth=16, mixtures=mixtures, side=4, sliding=sliding)
    constant = triton_stem.constants(sizes, mask=True, pooled=form == "pooled")
    absent = set() if form == "pooled" else {"signs", "place", "slopes", "moments"}
    if stage == "backward":
        constant |= {"IMAGE": False}
        absent |= {"grad_image"}
    function = getattr(triton_stem_kernels, f"stem_{stage}_kernel")
    kernel = _source(function, constant, absent & set(function.arg_names), triton_stem_kernels.SIZES, torch.float32)
    queries = 1 if sliding else 16
    return _build(kernel, triton_stem.warps(sizes), capability, (4, queries) if queries > 1 else (4,))


def _build(kernel_source, warps: int, capability: int, loop_trips: tuple[int, ...]) -> Build:
    import triton
    from triton.backends.compiler import GPUTarget

    options = {"num_warps": warps, "num_stages": 1, "enable_fp_fusion": True}
    kernel = triton.compile(kernel_source, target=GPUTarget("cuda", capability, 32), options=options)
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, listing = (
            subprocess.run([tools / tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for tool, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    ptx = kernel.asm["ptx"]
    # 64-bit accesses say .b64 or .v2.b32, 128-bit ones .v4.b32 or .v2.b64
    widths = [int(n or 1) * int(bits) // 8 for n, bits in re.findall(r"ld\.global\S*?(?:\.v(\d))?\.b(\d+)", ptx)]
    return Build(
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        stack=int(re.search(r"STACK:(\d+)", usage)[1]),
        shared=kernel.metadata.shared,
        instructions=executed(usual_way(listing), loop_trips),
        widest_load=max(widths),
        atomics=len(re.findall(r"\b(?:atom|red)\.", ptx)),
    )


def _source(function, constant: dict, absent: set[str], sizes: list[str], dtype: torch.dtype):
    """A kernel with its arguments as a call with channels innermost and aligned has them."""
    from triton.compiler import ASTSource

    signature, constexprs, attributes = {}, {}, {}
    for i, name in enumerate(function.arg_names):
        if name in constant or name in absent:
            signature[name], constexprs[(i,)] = "constexpr", constant.get(name)
        elif name in sizes:
            signature[name] = "i32"
        elif name == "scale":
            signature[name] = "fp32"
        else:  # a stride or a pointer
            is_stride = re.search(r"_[bchw]$", name)
            signature[name] = "i32" if is_stride else "*fp32" if name in WIDE else POINTER[dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(function, signature, constexprs, attributes)


def trips(stage: str, constant: dict, heads: int) -> tuple[int, ...]:
    """How often the body of each loop of a kernel runs, outermost first: over heads or the strip, over chunks."""
    outer = (tiles.STRIP,) if stage == "query" else (heads,) if heads > 1 else ()
    rolled = constant["CHUNKS"] > 1 and not constant.get("UNROLL", False)
    return outer + ((constant["CHUNKS"],) if rolled else ())


def usual_way(listing: str) -> str:
    """A disassembly without the function that only a number that is not finite calls (`_repair_...`), if it has one.

    Raises:
        ValueError: the function is there, but not called from one place behind a conditional exit.
    """
    head, *repair = re.split(r"(?m)^\s*\.type\s+\S*_repair_", listing, maxsplit=1)
    calls = re.findall(r"@!?\w+ EXIT\b(?:(?!EXIT|BRA).)*?CALL\S* `\(\S*_repair_", head, re.S)
    if len(calls) != bool(repair) or head.count("_repair_") != len(calls):
        raise ValueError("windows are not repaired by a function that is called once, at the end")
    return head


def executed(listing: str, loop_trips: tuple[int, ...]) -> dict[str, float]:
    """Executed instructions of a disassembly by operation: those inside a loop count once a trip."""
    labels, operations, jumps = {}, [], []
    for line in listing.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(operations)
        elif found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9]*)", line):
            if found[1] == "BRA" and (target := re.search(r"\((\.L_\w+)\)", line)):
                jumps.append((target[1], len(operations)))
            operations.append(found[1])
    loops = [(labels[name], end) for name, end in jumps if name in labels and labels[name] < end]
    total = collections.Counter()
    for i, name in enumerate(operations):
        depth = min(sum(start <= i <= end for start, end in loops), len(loop_trips))
        weight = 1.0
        for count in loop_trips[:depth]:
            weight *= count
        total[name] += weight
        total["all"] += weight
    return dict(total)


def per_pixel(build: Build, tile: tiles.TileConfig, side: int, operation: str = "all") -> float:
    """Executed warp instructions a pixel and head of a side x side map; a ragged tile's pixels are paid for as well."""
    tiles_of_map = -(-side // tile[0]) * -(-side // tile[1])
    return build.instructions.get(operation, 0.0) * tile[3] * tiles_of_map / side**2
