"""python -m sasa.kernels.tune: choose the tiles of backend "triton" by compiling for GPUs that need not be here.

Candidates whose patch is not much larger than need be are compiled for compute capability 9.0 and disassembled with the
tools that triton brings, larger ones where none of these fits. Those fit that keep all of their numbers in registers
and at most 48 KiB in shared memory. Of them the one with the fewest executed instructions a pixel wins, and among those
within 5% of it the one of which most warps fit on a multiprocessor, if it fits on 8.0 and 10.0 as well. Where none
fits, the one that spills least is taken, and its row says so. The choice and the figures behind it are written to
triton_table.json. Nothing is timed.

Executed instructions are those of the disassembly, its loops multiplied by their known trips, over the pixels of the
map that the tile stands for (pixels of ragged tiles are paid for and not counted). Shapes as in cuda.py.
"""

import argparse
import collections
import dataclasses
import functools
import itertools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from sasa.kernels import triton_backend as cuda

CHOOSING = 90  # compute capability, times ten, of the builds that choose
CAPABILITIES = (80, 90, 100)  # a choice has to fit on all of them
MAX_REGISTERS, MAX_STACK, MAX_SHARED = 255, 64, 48 * 1024
WARP_REGISTERS, WARPS, SHARED = 65536 // 32, 64, 227 * 1024  # of a multiprocessor of compute capability 9.0
WASTE = 1.15  # patches so much larger than the smallest are built only where no other fits
CLOSE = 1.05  # instructions within which occupancy decides
MAPS = {4: 4, 8: 7, 16: 14, 56: 56}  # bucket of the table -> the side of a ResNet's map that stands for it
DTYPES = {"half": torch.bfloat16, "float": torch.float32}
POINTER = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
WIDE = ("lse", "delta", "partial")  # buffers in fp32 whatever the maps are

# Tiles by kind and bucket of the map: rows, columns, rows of a chunk, warps. Found by hand to be worth a build; fp32
# has no tensor cores here and wants small ones.
CANDIDATES = {
    "half": {
        4: ((4, 4, 4, 1),),
        8: ((2, 8, 4, 1), (4, 8, 2, 2), (8, 8, 2, 4), (8, 8, 4, 4), (8, 8, 8, 4)),
        16: ((2, 8, 2, 1), (2, 8, 4, 1), (4, 4, 2, 1), (4, 8, 2, 2)),
    },
    "float": {56: ((4, 4, 1, 2),)},
}
CANDIDATES["half"][56] = CANDIDATES["half"][16]


@dataclasses.dataclass(frozen=True)
class Build:
    """What a compiled kernel needs. Instructions are executed warp instructions a tile."""

    registers: int
    stack: int  # bytes a thread; above 0 is a spill
    spills: int  # instructions that read or write it
    shared: int  # bytes
    instructions: dict[str, float]  # by the first word of the operation, and "all"
    widest_load: int  # bytes a thread
    atomics: int  # in the PTX

    @property
    def fits(self) -> bool:
        return not self.stack and not self.spills and self.registers <= MAX_REGISTERS and self.shared <= MAX_SHARED


def warps_resident(build: Build, warps: int) -> int:
    """Warps that a multiprocessor of compute capability 9.0 holds at once."""
    per_warp = -(-build.registers // 8) * 8
    programs = min(WARP_REGISTERS // (per_warp * warps), SHARED // (build.shared + 1024), WARPS // warps)
    return programs * warps


# Compiling -----------------------------------------------------------------------------------------------------------


def _source(stage: str, found: dict, dtype: torch.dtype):
    """The kernel with its arguments as a call with channels innermost and aligned has them."""
    from triton.compiler import ASTSource

    from sasa.kernels import triton_kernels as cuda_kernels

    function = getattr(cuda_kernels, f"{stage}_kernel")
    absent = {name for name in ("key", "grad_key") if not found["CONTENT"]}
    absent |= {name for name in ("rel_row", "rel_col", "partial") if not found["RELATIVE"]}
    signature, constexprs, attributes = {}, {}, {}
    for i, name in enumerate(function.arg_names):
        if name in found or name in absent:
            signature[name], constexprs[(i,)] = "constexpr", found.get(name)
        elif name in cuda_kernels.SIZES:
            signature[name] = "i32"
        elif name == "scale":
            signature[name] = "fp32"
        else:  # a stride or a pointer
            is_stride = re.search(r"_[bhw]$", name)
            signature[name] = "i32" if is_stride else "*fp32" if name in WIDE else POINTER[dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(function, signature, constexprs, attributes)


def compile_stage(
    stage: str, tile: cuda.Tile, kernel_size: int, shape: tuple[int, int, int], dtype: torch.dtype,
    *, capability: int = CHOOSING, mask: bool = True, content: bool = True, relative: bool = True,
) -> Build:  # fmt: skip
    """Compiles a kernel of triton_kernels.py for a GPU that need not be here; shape = (D, H, W)."""
    found = cuda.constants(stage, tile, kernel_size, shape, mask, content, relative)
    return _compile(stage, tuple(found.items()), tile[3], dtype, capability)


@functools.cache
def _compile(stage: str, constants: tuple, warps: int, dtype: torch.dtype, capability: int) -> Build:
    import triton
    from triton.backends.compiler import GPUTarget

    found = dict(constants)
    options = {"num_warps": warps, "num_stages": 1}
    kernel = triton.compile(_source(stage, found, dtype), target=GPUTarget("cuda", capability, 32), options=options)
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, listing = (
            subprocess.run([tools / tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for tool, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    instructions = executed(listing, stage, found["CHUNKS"])
    ptx = kernel.asm["ptx"]
    # 64-bit accesses say .b64 or .v2.b32, 128-bit ones .v4.b32 or .v2.b64
    widths = [int(n or 1) * int(bits) // 8 for n, bits in re.findall(r"ld\.global\S*?(?:\.v(\d))?\.b(\d+)", ptx)]
    return Build(
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        stack=int(re.search(r"STACK:(\d+)", usage)[1]),
        spills=len(re.findall(r"\b(?:LDL|STL)\b", listing)),
        shared=kernel.metadata.shared,
        instructions=instructions,
        widest_load=max(widths),
        atomics=len(re.findall(r"\b(?:atom|red)\.", ptx)),
    )


def executed(listing: str, stage: str, chunks: int) -> dict[str, float]:
    """Executed instructions of a tile by operation: those inside a loop count once a trip.

    The loop over the chunks of a patch is the innermost; the query kernel has the loop over the strip around it, whose
    body is one tile, and what is outside it is shared by a strip.
    """
    labels, operations, jumps = {}, [], []
    for line in listing.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(operations)
        elif found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9]*)", line):
            if found[1] == "BRA" and (target := re.search(r"\((\.L_\w+)\)", line)):
                jumps.append((target[1], len(operations)))
            operations.append(found[1])
    loops = [(labels[name], end) for name, end in jumps if name in labels and labels[name] < end]
    weights = [1.0 / cuda.STRIP if stage == "query" else 1.0] * len(operations)
    for i in range(len(operations)):
        depth = sum(start <= i <= end for start, end in loops)
        if stage == "query" and depth:
            weights[i] = float(chunks) ** (depth - 1)
        elif depth:
            weights[i] = float(chunks)
    total = collections.Counter({"all": sum(weights)})
    for name, weight in zip(operations, weights, strict=True):
        total[name] += weight
    return dict(total)


# Choosing ------------------------------------------------------------------------------------------------------------


def per_pixel(build: Build, tile: cuda.Tile, side: int, operation: str = "all") -> float:
    """Executed warp instructions a pixel of a side x side map."""
    tiles = -(-side // tile[0]) * -(-side // tile[1])
    return build.instructions.get(operation, 0.0) * tile[3] * tiles / side**2


def patch(stage: str, tile: cuda.Tile, kernel_size: int, shape: tuple[int, int, int]) -> int:
    """Pixels of a tile's patch: the pairs that a pixel pays for, K * K of them in its window."""
    found = cuda.constants(stage, tile, kernel_size, shape, True, True, True)
    return found["ROWS"] * found["PW"] * found["CHUNKS"]


def ranking(builds: dict[cuda.Tile, Build], cost: dict[cuda.Tile, float]) -> list[cuda.Tile]:
    """Best first: those close to the cheapest by how many warps are resident, then the others by cost."""

    def rank(tile: cuda.Tile) -> tuple[bool, float, float]:
        is_close = cost[tile] <= CLOSE * min(cost.values())
        return not is_close, -warps_resident(builds[tile], tile[3]) if is_close else 0, cost[tile]

    return sorted(builds, key=rank)


def choose(arguments: tuple[int, int, int, str]) -> tuple[str, dict]:
    """(K, width, bucket of the map, kind of dtype) -> the table's key and row."""
    kernel_size, width, bucket, kind = arguments
    dtype, side = DTYPES[kind], MAPS[bucket]
    row = {}
    for stage in cuda.STAGES:
        shape = (width, side, side)
        pairs = {tile: patch(stage, tile, kernel_size, shape) for tile in CANDIDATES[kind][bucket]}
        near = [tile for tile in pairs if pairs[tile] <= WASTE * min(pairs.values())]
        builds: dict[cuda.Tile, Build] = {}
        for tile in near + [tile for tile in pairs if tile not in near]:
            if tile in near or not any(build.fits for build in builds.values()):
                builds[tile] = compile_stage(stage, tile, kernel_size, shape, dtype)
        fitting = {tile: build for tile, build in builds.items() if build.fits}
        if not fitting:
            fitting = dict([min(builds.items(), key=lambda item: item[1].stack)])
        cost = {tile: per_pixel(build, tile, side) for tile, build in fitting.items()}
        ranked = ranking(fitting, cost)
        everywhere = (
            tile
            for tile in ranked
            if all(compile_stage(stage, tile, kernel_size, shape, dtype, capability=c).fits for c in CAPABILITIES)
        )
        tile = next(everywhere, ranked[0])
        build = fitting[tile]
        row[stage] = {
            "tile": tile, "registers": build.registers, "stack": build.stack, "shared": build.shared,
            "instructions": round(cost[tile], 1), "warps": warps_resident(build, tile[3]),
            "candidates": len(builds), "fitting": sum(build.fits for build in builds.values()),
        }  # fmt: skip
    return cuda.table_key(kernel_size, width, bucket, dtype), row


# Roofline ------------------------------------------------------------------------------------------------------------

FLOPS = 2 * 2048  # of a product instruction, m16n8k16
PRODUCT = ("HMMA", "HGMMA", "UTCHMMA")
OPERATIONS = {"forward": 5, "query": 7, "key": 5}  # a pair needs: bias, exp2, maximum or gradient, sums
PRODUCTS = {"forward": 2, "query": 3, "key": 4}  # multiply-adds a pair and channel
MAPS_MOVED = {"forward": 4, "query": 6, "key": 6}  # q k v out; q k v g out dq; q k v g dk dv
SCALARS = {"forward": 1, "query": 2, "key": 2}  # fp32 a pixel: log-sum-exp, delta
LAYERS = ((8, 56), (16, 28), (32, 14), (64, 7))  # head width and map of a ResNet's stages


def roofline(stage: str, head_dim: int, side: int, kernel_size: int = 7) -> dict[str, float]:
    """Bytes and instructions a pixel and head in bf16, and the least that they could be.

    Bytes: what programs ask for, so pixels of neighbouring tiles' halos count again (caches serve them), and the ideal,
    each number once. Instructions: executed in warps, and the ideal, which takes K * K pairs a pixel and no others,
    whole product instructions, 16-byte loads and stores.
    """
    dtype, size = torch.bfloat16, 2
    tile = tuple(cuda.table()[cuda.table_key(kernel_size, head_dim, side, dtype)][stage]["tile"])
    build = compile_stage(stage, tile, kernel_size, (head_dim, side, side), dtype)
    tiles = -(-side // tile[0]) * -(-side // tile[1])
    patches = patch(stage, tile, kernel_size, (head_dim, side, side)) * tiles / side**2  # pixels of patches a pixel
    ideal_bytes = MAPS_MOVED[stage] * head_dim * size + 4 * SCALARS[stage]
    again = head_dim * size * 2 + (
        8 if stage == "key" else 0
    )  # two maps come by patches, to the key kernel scalars too
    read = ideal_bytes + (patches - 1) * again
    pairs = kernel_size**2
    ideal = pairs * OPERATIONS[stage] / 32 + pairs * PRODUCTS[stage] * head_dim * 2 / FLOPS + ideal_bytes / 16 / 32
    instructions, products = per_pixel(build, tile, side), sum(per_pixel(build, tile, side, name) for name in PRODUCT)
    return {
        "kernel": stage, "D": head_dim, "map": side, "tile": "x".join(map(str, tile[:2])), "warps": tile[3],
        "registers": build.registers, "shared": build.shared, "warps an SM": warps_resident(build, tile[3]),
        "bytes": round(read), "ideal bytes": ideal_bytes, "bytes / ideal": round(read / ideal_bytes, 1),
        "instructions": round(instructions, 1), "ideal instructions": round(ideal, 1),
        "instructions / ideal": round(instructions / ideal, 1), "products": round(products, 1),
        "exp2": round(per_pixel(build, tile, side, "MUFU"), 1),
    }  # fmt: skip


def print_roofline() -> None:
    """As a Markdown table."""
    print("bf16, K = 7, compiled for compute capability 9.0; bytes and warp instructions a pixel and head:\n")
    rows = [roofline(stage, head_dim, side) for stage, (head_dim, side) in itertools.product(cuda.STAGES, LAYERS)]
    print(f"| {' | '.join(rows[0])} |\n{'|---' * len(rows[0])}|")
    for row in rows:
        print(f"| {' | '.join(map(str, row.values()))} |")


def write(key: str, row: dict) -> None:
    """One row of the table, a line of the file: an interrupted run keeps what it has."""
    table = json.loads(cuda.TABLE.read_text())["tiles"] if cuda.TABLE.exists() else {}
    table[key] = row
    rows = ",\n".join(f" {json.dumps(key)}: {json.dumps(table[key])}" for key in sorted(table))
    cuda.TABLE.write_text(f'{{"tiles": {{\n{rows}\n}}}}\n')


# Command line --------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m sasa.kernels.tune", description=__doc__.splitlines()[0])
    parser.add_argument("--kernel-size", type=int, nargs="+", default=cuda.WINDOWS, help="only the rows of these")
    parser.add_argument("--head-dim", type=int, nargs="+", default=cuda.WIDTHS, help="only the rows of these")
    parser.add_argument("--roofline", action="store_true", help="choose nothing, only print the table of rooflines")
    parser.add_argument("--quiet", action="store_true", help="leave the rooflines out")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    args = parser.parse_args(argv)
    if not args.roofline:
        start = time.monotonic()
        sizes, widths = (
            sorted({cuda.bucket(value, bounds) for value in given})
            for given, bounds in ((args.kernel_size, cuda.WINDOWS), (args.head_dim, cuda.WIDTHS))
        )
        work = [
            (size, width, side, kind)
            for size, width, kind in itertools.product(sizes, widths, DTYPES)
            for side in cuda.SIDES[kind]
        ]
        with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
            for key, row in pool.imap_unordered(choose, work):
                write(key, row)
                print(key, *(f"{stage} {row[stage]['tile']}" for stage in row), flush=True)
        print(f"{len(work)} rows in {time.monotonic() - start:.0f} s")
        cuda.table.cache_clear()
    if not args.quiet:
        print_roofline()
    return 0


if __name__ == "__main__":
    sys.exit(main())
