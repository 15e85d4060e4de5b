"""What the Triton kernels of a ResNet's layers read, write and execute, beside the least that they could; no GPU.

Bytes: what programs ask for, so that pixels of neighbouring tiles' halos count again (caches serve them), and the
ideal, each number once. Instructions: executed in warps, and the ideal, which takes K * K pairs a pixel and no others,
whole product instructions, 16-byte loads and stores. Shapes as in triton_kernels.py.
"""

import itertools

import torch

from sasa.kernels import triton_builds as builds
from sasa.kernels import triton_tiles as tiles

FLOPS = 2 * 2048  # of a product instruction, m16n8k16
PRODUCT = ("HMMA", "HGMMA", "UTCHMMA")
OPERATIONS = {"forward": 5, "query": 7, "key": 5}  # a pair needs: bias, exp2, maximum or gradient, sums
PRODUCTS = {"forward": 2, "query": 3, "key": 4}  # multiply-adds a pair and channel
MAPS_MOVED = {"forward": 4, "query": 6, "key": 6}  # q k v out; q k v g out dq; q k v g dk dv
SCALARS = {"forward": 1, "query": 2, "key": 2}  # fp32 a pixel: log-sum-exp, delta
LAYERS = ((8, 56), (16, 28), (32, 14), (64, 7))  # head width and map of a ResNet's stages
HEADS = 8


def roofline(stage: str, head_dim: int, side: int, kernel_size: int = 7) -> dict[str, float]:
    """Bytes and instructions a pixel and head of one kernel in bf16, compute capability 9.0, and the least possible."""
    dtype, size = torch.bfloat16, 2
    problem = tiles.Problem(HEADS, head_dim, side, side, kernel_size)
    tile = tiles.tile_of(stage, problem, dtype, f"{builds.triton_version()} 90")
    build = builds.compile_stage(stage, tile, problem, dtype, heads=HEADS)
    constant = tiles.constants(stage, tile, problem, dtype, HEADS)
    tiles_of_map = -(-side // tile[0]) * -(-side // tile[1])
    patches = constant["ROWS"] * constant["PW"] * constant["CHUNKS"] * tiles_of_map / side**2  # their pixels a pixel
    ideal_bytes = MAPS_MOVED[stage] * head_dim * size + 4 * SCALARS[stage]
    again = head_dim * size * 2 + (8 if stage == "key" else 0)  # two maps come by patches, for the key scalars too
    read = ideal_bytes + (patches - 1) * again
    pairs = kernel_size**2
    ideal = pairs * OPERATIONS[stage] / 32 + pairs * PRODUCTS[stage] * head_dim * 2 / FLOPS + ideal_bytes / 16 / 32
    instructions = builds.per_pixel(build, tile, side)
    products = sum(builds.per_pixel(build, tile, side, name) for name in PRODUCT)
    return {
        "kernel": stage, "D": head_dim, "map": side, "tile": "x".join(map(str, tile[:2])), "warps": tile[3],
        "registers": build.registers, "stack": build.stack, "shared": build.shared,
        "warps an SM": builds.warps_resident(build.registers, build.shared, tile[3]),
        "bytes": round(read), "ideal bytes": ideal_bytes, "bytes / ideal": round(read / ideal_bytes, 1),
        "instructions": round(instructions, 1), "ideal instructions": round(ideal, 1),
        "instructions / ideal": round(instructions / ideal, 1), "products": round(products, 1),
        "exp2": round(builds.per_pixel(build, tile, side, "MUFU"), 1),
    }  # fmt: skip


def markdown() -> str:
    """All kernels of a ResNet's stages as a Markdown table."""
    rows = [roofline(stage, head_dim, side) for stage, (head_dim, side) in itertools.product(tiles.STAGES, LAYERS)]
    lines = [
        f"bf16, K = 7, 8 heads a program, triton {builds.triton_version()}, compiled for compute capability 9.0; bytes "
        "and warp instructions a pixel and head:\n",
        f"| {' | '.join(rows[0])} |",
        "|---" * len(rows[0]) + "|",
    ]
    return "\n".join([*lines, *(f"| {' | '.join(map(str, row.values()))} |" for row in rows)])
