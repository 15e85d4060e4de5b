"""How backend "triton" cuts a call into tiles: the table of tiles, and what each kernel is compiled for.

Pure functions of numbers; neither torch's CUDA side nor triton is needed. The table (triton_table.json) is written by
`python -m sasa.kernels.tune` from the instructions it counts with each version of triton.

Shapes: B batch, N heads, D head width, H x W map, K window side.
"""

import functools
import json
from pathlib import Path
from typing import NamedTuple

import torch

TABLE = Path(__file__).with_name("triton_table.json")
STAGES = ("forward", "query", "key")  # the kernels; the last two are the backward
STRIP = 8  # tiles of a strip: long enough that partial sums are small, short enough to fill the GPU
MAX_STACK = 64  # bytes a thread of a build
HEADS = (8, 4, 2, 1)  # that one program serves in turn, sharing what does not depend on the head
ENOUGH = 4096  # programs of a launch: four times what the largest GPUs hold at once
LARGEST = 2**31 - 1  # of an offset inside a patch, in elements: 32 bits
MAX_GRID = 65535  # of the grid's second and third axis

# Rows and columns of the tile, rows of a chunk of its patch, warps, and whether the loop over chunks is unrolled (that
# of the forward kernel never is).
TileConfig = tuple[int, int, int, int, int]


class Problem(NamedTuple):
    """What a kernel's build depends on besides its tile and dtype."""

    num_heads: int
    head_dim: int
    height: int
    width: int
    kernel_size: int
    mask: bool = True  # the border: keys outside the map are left out
    content: bool = True  # there are keys
    relative: bool = True  # there are embeddings
    fused: bool = True  # query, key and value are slices of one projection, and their gradients of another


@functools.cache
def table() -> dict[str, dict]:
    """Row (see `table_key`) -> stage -> the chosen "tile", the "builds" counted, and those "confining".

    A build is null where it does not compile. "instead" holds the tiles of targets that need another: "<version of
    triton> <compute capability, times ten>".
    """
    return json.loads(TABLE.read_text(encoding="utf-8"))


def bucket(value: int, bounds: tuple[int, ...]) -> int:
    """The smallest bound that `value` does not exceed, else the largest."""
    return next((bound for bound in bounds if value <= bound), bounds[-1])


# The table's rows; 56: and larger, whose patches no border clamps. fp32 is there to be right, not fast, and has one
# tile for all maps.
WINDOWS, WIDTHS, SIDES = (3, 5, 7, 13), (16, 32, 64), {"half": (4, 8, 56), "float": (56,)}


def table_key(kernel_size: int, head_dim: int, side: int, dtype: torch.dtype) -> str:
    """The row of the table for a map whose longer side is `side`."""
    kind = "float" if dtype == torch.float32 else "half"
    sizes = bucket(kernel_size, WINDOWS), bucket(head_dim, WIDTHS), bucket(side, SIDES[kind])
    return "K{} d{} map{} {}".format(*sizes, kind)


def tile_name(tile: TileConfig) -> str:
    """A tile as the table's key."""
    return " ".join(map(str, tile))


def choice(entry: dict, target: str | None) -> TileConfig:
    """The tile of a row's kernel, for a target where it is known."""
    return tuple(entry.get("instead", {}).get(target, entry["tile"]))


def is_clamped(stage: str, problem: Problem) -> bool:
    """Whether the border clamps the patches of a kernel, as in all builds that the table counts."""
    return problem.mask or stage == "key"


def row_of(stage: str, problem: Problem, dtype: torch.dtype) -> str:
    """The row of the table that a kernel of this call has its tile from.

    Small maps have tiles of their own because the border clamps the patches. Where it does not, the programs are those
    of large maps, except on maps of at most 4 with windows up to 7, where the small tile needs fewer instructions.
    """
    side = max(problem.height, problem.width)
    smallest, *_, largest = SIDES["half"]
    if not is_clamped(stage, problem) and (side > smallest or bucket(problem.kernel_size, WINDOWS) == WINDOWS[-1]):
        side = largest
    return table_key(problem.kernel_size, problem.head_dim, side, dtype)


def tile_of(stage: str, problem: Problem, dtype: torch.dtype, target: str | None = None) -> TileConfig:
    """The table's choice."""
    return choice(table()[row_of(stage, problem, dtype)][stage], target)


CONFINING = 1.03  # of the instructions without it: what keeping NaN in its windows may cost


@functools.cache
def confines(stage: str, row: str, target: str) -> bool:
    """Whether a kernel keeps NaN and infinity in the windows that hold them: where the counts say that it is cheap.

    Args:
        stage: one of STAGES.
        row: of the table, see `row_of`; its builds are of the masked border.
        target: "<version of triton, major and minor> <compute capability, times ten>".

    Returns:
        Whether the chosen tile was counted for this target and compiles, and then takes at most CONFINING of its
        instructions, and no more stack than it does anyway or MAX_STACK. A tile that is taken instead was not counted.
    """
    entry = table()[row][stage]
    before = entry["builds"][tile_name(entry["tile"])].get(target)
    after = entry.get("confining", {}).get(target)
    if before is None or after is None or target in entry.get("instead", {}):
        return False
    return after[0] <= CONFINING * before[0] and after[2] <= max(MAX_STACK, before[2])


def power(value: int) -> int:
    """The smallest power of two that `value` does not exceed."""
    return 1 << (value - 1).bit_length()


def constants(
    stage: str, tile: TileConfig, problem: Problem, dtype: torch.dtype, heads: int = 1, confine: bool = False
) -> dict[str, int]:
    """What a kernel is compiled for.

    Args:
        stage: one of STAGES.
        tile: how the kernel cuts its map.
        problem: the call.
        dtype: of the maps.
        heads: of N, that one program serves in turn (the query kernel always serves one).
        confine: see `confines`.
    """
    tile_h, tile_w, rows, _, unroll = tile
    span_h, span_w = tile_h + problem.kernel_size - 1, tile_w + problem.kernel_size - 1
    if problem.mask or stage == "key":  # the patch need not reach over the border
        span_h, span_w = min(span_h, problem.height), min(span_w, problem.width)
    rows = min(rows, power(span_h))
    patch_w = max(power(span_w), 16 // rows)  # a product takes 16 pixels at least
    chunks, sums = -(-span_h // rows), dtype != torch.float32
    found = {
        "N": problem.num_heads, "HEADS": heads,
        "K": problem.kernel_size, "WINDOW": 8 if problem.kernel_size <= 8 else 16,
        "D": problem.head_dim, "DP": max(power(problem.head_dim), 16), "TH": tile_h, "TW": tile_w, "ROWS": rows,
        "PW": patch_w, "CHUNKS": chunks, "MASK": problem.mask, "CONTENT": problem.content,
        "RELATIVE": problem.relative, "FUSED": problem.fused, "STRIP": STRIP, "SUMS": sums,
        "COLS": max(patch_w, 16) if sums else patch_w, "UNROLL": bool(unroll), "CONFINE": confine,
    }  # fmt: skip
    of_query = ("STRIP", "SUMS", "COLS")
    leave_out = {"forward": (*of_query, "UNROLL"), "query": ("HEADS",), "key": (*of_query, "MASK")}[stage]
    return {name: value for name, value in found.items() if name not in leave_out}


def heads_per_program(num_heads: int, tiles: int) -> int:
    """As many heads in one program as divide N and leave enough programs; `tiles` of the whole batch."""
    return next(h for h in HEADS if num_heads % h == 0 and (h == 1 or tiles * (num_heads // h) >= ENOUGH))


def exceeded(constant: dict[str, int], problem: Problem, strides: tuple[int, ...]) -> str | None:
    """Which limit the sizes of a call exceed, or None; `strides` of B, H and W, map by map, in elements.

    A tile's own address is computed in 64 bits, so only what one patch spans is limited, not the map.
    """
    rows = min(constant["ROWS"] * constant["CHUNKS"], problem.height) - 1
    cols = min(constant["PW"], problem.width) - 1
    for stride_h, stride_w in zip(strides[1::3], strides[2::3], strict=True):
        span = rows * stride_h + cols * stride_w + problem.head_dim
        if span > LARGEST:
            return f"{rows + 1} rows of a map span {span} elements in memory, it takes up to {LARGEST}"
    tiles_h = -(-problem.height // constant["TH"])
    if tiles_h > MAX_GRID:
        return f"a map of {problem.height} rows, it takes up to {MAX_GRID * constant['TH']}"
    return None
