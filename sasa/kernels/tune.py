"""python -m sasa.kernels.tune: choose the tiles of backend "triton" by compiling for GPUs that need not be here.

`count` compiles candidates with the version of triton that is installed and writes what each needs into
triton_table.json, beside the figures of other versions; `choose` takes the tile of each row and kernel from all of
them. A candidate fits where it keeps to 255 registers, 64 bytes of stack and 48 KiB of shared memory with every version
and compute capability that was counted for all candidates of the kernel. Of those that fit, the one with the fewest
executed instructions a pixel wins (compute capability 9.0, the mean over versions of the ratio to the best), and among
those within 5% of it the one of which most warps fit on a multiprocessor. Where none fits, or one that does not needs
8% fewer instructions, the one with the fewest is taken: the instructions that spills cost are among them. Nothing is
timed.

A whole table takes one `count` with each version of triton, then `choose`:

    PYTHONPATH=<where triton 3.6 is> python -m sasa.kernels.tune count
    python -m sasa.kernels.tune choose
    python -m sasa.kernels.tune count --chosen --capability 80 100 120
    python -m sasa.kernels.tune count --spilling --capability 80 90 100 120
    python -m sasa.kernels.tune choose    (if it changes a tile, again from --chosen on)
    python -m sasa.kernels.tune count --confining --capability 80 90 100 120
    python -m sasa.kernels.tune show
    python -m sasa.kernels.tune confining
    python -m sasa.kernels.tune coverage
    python -m sasa.kernels.tune roofline
"""

import itertools
import json
import re
import time

import torch

from sasa import console, files
from sasa.kernels import triton_builds as builds
from sasa.kernels import triton_roofline
from sasa.kernels import triton_tiles as tiles

CHOOSING = 90  # compute capability, times ten, whose instructions count
MAX_REGISTERS, MAX_STACK, MAX_SHARED = 255, tiles.MAX_STACK, 48 * 1024
CLOSE = 1.05  # instructions within which occupancy decides
WORTH = 0.92  # of the instructions of the best that fits: so few are worth more spilled bytes
HEADS = 8  # of a program in the counted builds
MAPS = {4: 4, 8: 7, 56: 56}  # bucket of the table -> the side of a ResNet's map that stands for it
DTYPES = {"half": torch.bfloat16, "float": torch.float32}
FIGURES = ("instructions", "registers", "stack", "shared")  # of a build in the table, in this order

# Candidates by window and map, found by hand to be worth a build: the patches of others are larger.
_SMALL = ((4, 4, 4, 1, 0),)  # maps that are one tile
_WHOLE = ((8, 8, 8, 4, 1), (8, 8, 4, 4, 0), (8, 8, 4, 4, 1), (2, 8, 8, 1, 1), (2, 8, 4, 1, 0))
_LARGE = {
    3: ((2, 8, 4, 1, 1), (2, 8, 2, 1, 0)),
    5: ((2, 8, 8, 1, 1), (2, 8, 2, 1, 0), (2, 8, 2, 1, 1)),
    7: ((2, 8, 8, 1, 1), (2, 8, 4, 1, 1), (2, 8, 4, 1, 0), (2, 8, 2, 1, 0)),
    13: ((4, 4, 4, 1, 0), (4, 4, 2, 1, 0)),
}
_WIDE = ((2, 8, 2, 1, 0), (2, 8, 4, 1, 0), (2, 8, 1, 1, 0), (4, 8, 2, 2, 0))  # K = 7, heads of 64


def candidates(stage: str, kernel_size: int, width: int, bucket: int, kind: str) -> tuple[tiles.TileConfig, ...]:
    """The tiles worth a build; fp32 has no tensor cores here and wants a small one."""
    if kind == "float":
        return ((4, 4, 1, 2, 0),)
    found = {4: _SMALL, 8: _WHOLE, 56: _WIDE if (kernel_size, width) == (7, 64) else _LARGE[kernel_size]}[bucket]
    if stage == "forward":  # which has no unrolled form
        found = tuple(dict.fromkeys((*tile[:4], 0) for tile in found))
    return found


def table_rows() -> list[tuple[str, tuple[int, int, int, str]]]:
    """The table's rows: key -> (K, head width, bucket of the map, kind of dtype), the most used first."""
    return [
        (tiles.table_key(size, width, side, DTYPES[kind]), (size, width, side, kind))
        for kind in DTYPES
        for size in sorted(tiles.WINDOWS, key=lambda k: k != 7)
        for side, width in itertools.product(tiles.SIDES[kind][::-1], tiles.WIDTHS)
    ]


def count(
    tile: tiles.TileConfig, stage: str, row: tuple[int, int, int, str], capability: int, confine: bool = False
) -> list[float] | None:
    """`FIGURES` of a build with the installed version of triton; None where its compiler fails."""
    size, width, bucket, kind = row
    side = MAPS[bucket]
    problem = tiles.Problem(HEADS, width, side, side, size)
    try:
        build = builds.compile_stage(
            stage, tile, problem, DTYPES[kind], capability=capability, heads=HEADS, confine=confine
        )
    except RuntimeError:
        return None
    return [round(builds.per_pixel(build, tile, side), 1), build.registers, build.stack, build.shared]


def fits(figures: list[float] | None) -> bool:
    """Whether a build keeps to the limits."""
    if figures is None:
        return False
    _, registers, stack, shared = figures
    return registers <= MAX_REGISTERS and stack <= MAX_STACK and shared <= MAX_SHARED


def choose(found: dict[str, dict[str, list[float] | None]]) -> tiles.TileConfig:
    """The best tile of one kernel's builds: tile -> "<version> <capability>" -> figures.

    Raises:
        ValueError: no version has counted every tile, or none of them compiles everywhere.
    """
    found = {tile: x for tile, x in found.items() if None not in x.values()}
    if not found:
        raise ValueError("no candidate compiles with every version of triton")
    common = set.intersection(*(set(x) for x in found.values()))  # a column of one tile alone must not count against it
    versions = {key for key in common if key.endswith(f" {CHOOSING}")}
    if not versions:
        raise ValueError(f"no version of triton has counted every candidate for compute capability {CHOOSING / 10}")
    best = {v: min(x[v][0] for x in found.values()) for v in versions}
    cost = {tile: sum(x[v][0] / best[v] for v in versions) / len(versions) for tile, x in found.items()}
    fitting = {tile: x for tile, x in found.items() if all(fits(x[key]) for key in common)}
    if not fitting or min(cost.values()) <= WORTH * min(cost[tile] for tile in fitting):
        return tuple(map(int, min(cost, key=cost.get).split()))
    cost = {tile: cost[tile] for tile in fitting}

    def rank(tile: str) -> tuple[bool, float, float]:
        warps = int(tile.split()[3])
        resident = min(builds.warps_resident(*fitting[tile][v][1::2], warps) for v in versions)
        is_close = cost[tile] <= CLOSE * min(cost.values())
        return not is_close, -resident if is_close else 0, cost[tile]

    return tuple(map(int, min(fitting, key=rank).split()))


# The table ----------------------------------------------------------------------------------------------------------


def read() -> dict[str, dict]:
    """The table as it is in the file, or an empty one."""
    return json.loads(tiles.TABLE.read_text(encoding="utf-8")) if tiles.TABLE.exists() else {}


def write(table: dict[str, dict]) -> None:
    """Row by row, kernel by kernel, a build a line."""
    text = json.dumps(table, indent=1, sort_keys=True)
    text = re.sub(r"\[[^\[\]{}]*\]", lambda found: " ".join(found[0].split()), text)  # a list in one line
    text = text.replace("[ ", "[").replace(" ]", "]")
    files.write_text(tiles.TABLE, text + "\n")


def instead(found: dict[str, dict[str, list[float] | None]], tile: tiles.TileConfig) -> dict[str, list[int]]:
    """Target -> the best tile that keeps to the limits there with fewer instructions than `tile`, which spills."""
    better = {}
    for target, figures in found[tiles.tile_name(tile)].items():
        others = {x: built[target] for x, built in found.items() if fits(built.get(target))}
        best = min(others, key=lambda x: others[x][0], default=None)
        if figures is not None and figures[2] > MAX_STACK and best and others[best][0] < figures[0]:
            better[target] = list(map(int, best.split()))
    return better


def spills(entry: dict, column: str) -> bool:
    """Whether the chosen tile of a kernel was counted with more stack than MAX_STACK there."""
    figures = entry["builds"][tiles.tile_name(entry["tile"])].get(column)
    return figures is not None and figures[2] > MAX_STACK


def count_missing(version: str, capabilities: list[int], sizes: list[int], which: str | None, seconds: float) -> int:
    """Counts what the table lacks for this version, for at most `seconds`; -> how many builds it made.

    which: None for every candidate, "chosen" for the chosen tiles alone, "spilling" for every candidate where the
    chosen one needs more stack than MAX_STACK, "confining" for builds of the chosen tiles that keep NaN in its windows,
    for `triton_tiles.confines`.
    """
    start, made, table, confine = time.monotonic(), 0, read(), which == "confining"
    for (key, row), stage in itertools.product(table_rows(), tiles.STAGES):
        if row[0] not in sizes:
            continue
        entry = table.setdefault(key, {}).setdefault(stage, {"builds": {}})
        of_chosen = which in ("chosen", "confining")
        wanted = [tile for tile in candidates(stage, *row) if not of_chosen or list(tile) == entry["tile"]]
        for tile, capability in itertools.product(wanted, capabilities):
            column = f"{version} {capability}"
            if which == "spilling" and not spills(entry, column):
                continue
            built = (
                entry.setdefault("confining", {}) if confine else entry["builds"].setdefault(tiles.tile_name(tile), {})
            )
            if column not in built and time.monotonic() - start < seconds:
                built[column] = count(tile, stage, row, capability, confine)
                made += 1
                print(f"{column}  {key}  {stage} {tile}: {built[column]}", flush=True)
        write(table)  # an interrupted run keeps what it has
    return made


def show(kernel_size: int = 7) -> str:
    """The chosen tiles' figures with each version as a Markdown table."""
    table, lines = read(), []
    columns = sorted({c for row in table.values() for s in row.values() for b in s["builds"].values() for c in b})
    columns = [column for column in columns if column.endswith(f" {CHOOSING}")]
    lines.append(f"| row | kernel | tile | {' | '.join(c.split()[0] for c in columns)} |")
    lines.append("|---|---|---|" + "---|" * len(columns))
    for (key, row), stage in itertools.product(table_rows(), tiles.STAGES):
        if row[0] != kernel_size or row[3] != "half":
            continue
        entry = table[key][stage]
        found = [entry["builds"][tiles.tile_name(tiles.choice(entry, c))].get(c) for c in columns]
        cells = ["-" if figures is None else "{:.1f}, {:.0f} r, {:.0f} B".format(*figures) for figures in found]
        lines.append(f"| {key} | {stage} | {tiles.tile_name(entry['tile'])} | {' | '.join(cells)} |")
    return "\n".join(lines)


def coverage() -> str:
    """What the chosen tiles need with each version and compute capability as a Markdown table."""
    table = read()
    chosen = [table[key][stage] for (key, _), stage in itertools.product(table_rows(), tiles.STAGES)]
    columns = {tuple(column.split()) for entry in chosen for column in entry["builds"][tiles.tile_name(entry["tile"])]}
    columns = sorted(columns, key=_column_order)
    versions, capabilities = (list(dict.fromkeys(part)) for part in zip(*columns, strict=True))
    capabilities.sort(key=int)
    lines = [
        f"| triton | {' | '.join(f'{int(c) / 10}' for c in capabilities)} |",
        "|---" * (len(capabilities) + 1) + "|",
    ]
    for version in versions:
        cells = []
        for capability in capabilities:
            target = f"{version} {capability}"
            found = [entry["builds"][tiles.tile_name(tiles.choice(entry, target))].get(target, ()) for entry in chosen]
            counted = [figures for figures in found if figures]
            failed = sum(figures is None for figures in found)
            above = [figures[2] for figures in counted if figures[2] > MAX_STACK]
            text = f"{len(counted)} of {len(chosen)}" + f", {failed} do not compile" * (failed > 0)
            text += f"; {max(figures[1] for figures in counted)} r" if counted else ""
            cells.append(text + (f"; {len(above)} above {MAX_STACK} B, at most {max(above)} B" if above else ""))
        lines.append(f"| {version} | {' | '.join(cells)} |")
    return "\n".join(lines)


def confining(kernel_size: int = 7) -> str:
    """Instructions that keeping NaN in its windows adds, in per cent, as a Markdown table; "no": it is left off.

    "-": it does not compile, or was not counted. A cell holds compute capabilities 8.0, 9.0, 10.0 and 12.0 in turn.
    """
    versions, table = ("3.3", "3.6", "3.8", "3.9"), read()
    lines = [f"| row | kernel | {' | '.join(versions)} |", "|---|---|" + "---|" * len(versions)]
    for (key, row), stage in itertools.product(table_rows(), tiles.STAGES):
        entry = table[key][stage]
        if row[0] != kernel_size:
            continue
        cells = []
        for version in versions:
            cell = []
            for capability in (80, 90, 100, 120):
                column = f"{version} {capability}"
                before, after = (
                    entry["builds"][tiles.tile_name(entry["tile"])].get(column),
                    entry.get("confining", {}).get(column),
                )
                added = "-" if None in (before, after) else f"{100 * (after[0] / before[0] - 1):.1f}"
                cell.append(added if added == "-" or tiles.confines(stage, key, column) else f"{added} no")
            cells.append(", ".join(cell))
        lines.append(f"| {key} | {stage} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _column_order(column: tuple[str, str]) -> tuple[tuple[int, ...], int]:
    version, capability = column
    return tuple(map(int, version.split("."))), int(capability)


# Command line --------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """The command line; -> exit code."""
    parser = console.Parser(prog="python -m sasa.kernels.tune", description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=("count", "choose", "show", "coverage", "confining", "roofline"))
    parser.add_argument(
        "--capability", type=int, nargs="+", default=[CHOOSING], help="count: compute capabilities, times ten"
    )
    parser.add_argument(
        "--kernel-size", type=int, nargs="+", default=tiles.WINDOWS, choices=tiles.WINDOWS, help="only these rows"
    )
    which = parser.add_mutually_exclusive_group()
    for flag, text in (
        ("chosen", "the chosen tiles alone"),
        ("spilling", f"every candidate where the chosen tile needs more than {MAX_STACK} bytes of stack"),
        ("confining", "the chosen tiles' builds that keep NaN in the windows that hold it"),
    ):
        which.add_argument(f"--{flag}", dest="which", action="store_const", const=flag, help=f"count: {text}")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="count: start no build after so long")
    args = parser.parse_args(argv)
    if args.command == "count":
        version = builds.triton_version()
        made = count_missing(version, args.capability, args.kernel_size, args.which, args.seconds)
        print(f"{made} builds with triton {version}")
    elif args.command == "choose":
        table = read()
        for (key, row), stage in itertools.product(table_rows(), tiles.STAGES):
            wanted = {tiles.tile_name(tile) for tile in candidates(stage, *row)}
            found = {tile: x for tile, x in table[key][stage]["builds"].items() if tile in wanted}
            entry, tile = table[key][stage], list(choose(found))
            if tile != entry.get("tile"):
                entry.pop("confining", None)  # which was counted of another tile
            entry["tile"] = tile
            entry.pop("instead", None)
            if others := instead(found, tile):
                entry["instead"] = others
        write(table)
    elif args.command == "coverage":
        print(coverage())
    elif args.command == "confining":
        for size in args.kernel_size:
            print(confining(size), end="\n\n")
    elif args.command == "roofline":
        print(triton_roofline.markdown())
    else:
        for size in args.kernel_size:
            print(show(size), end="\n\n")
    return 0


if __name__ == "__main__":
    console.run_main(main)
