"""Backend "triton" compiled without a GPU: registers, stack, instructions, and the table that tiles are chosen from.

All builds: python -m pytest tests/kernels/test_triton_builds.py -m slow.
"""

import itertools
import os
from pathlib import Path

import pytest
import torch

from sasa import kernels
from sasa.kernels import triton_builds as builds
from sasa.kernels import triton_stem, tune
from sasa.kernels import triton_tiles as tiles
from tools.gpu import predictions
from triton_cases import DTYPES, HALF, needs_compiler, refused

DOCS = Path(kernels.__file__).parents[2] / "docs" / "kernels.md"
needs_builds = pytest.mark.skipif(
    refused is not None,
    reason=f"{refused}; registers, stack, shared memory, load widths and atomics of builds are not checked here",
)
LAYERS = {8: 56, 16: 28, 32: 14, 64: 7}  # head width -> map, the stages of a ResNet
ARCHITECTURES = (80, 90, 100)


def build(stage, width, dtype, capability, kernel_size=7, **parts):
    side = LAYERS[width]
    call = tiles.Problem(8, width, side, side, kernel_size, **parts)
    return builds.compile_stage(stage, tiles.tile_of(stage, call, dtype), call, dtype, capability=capability)


def check_build(got, stage, width, dtype, **parts):
    """The same on every version of triton: a few spilled bytes come and go with the version, and cost little.

    Where no tile keeps to MAX_STACK on every version, the table shows what the one with the fewest instructions needs.
    """
    side = LAYERS[width]
    entry = tiles.table()[tiles.row_of(stage, tiles.Problem(8, width, side, side, 7, **parts), dtype)][stage]
    spilled = max(figures[2] for figures in entry["builds"][tiles.tile_name(entry["tile"])].values())
    assert got.stack <= max(tune.MAX_STACK, 1.25 * spilled if spilled > tune.MAX_STACK else 0)
    assert got.registers <= tune.MAX_REGISTERS
    assert got.shared <= tune.MAX_SHARED
    assert got.atomics == 0
    assert got.widest_load == 16


@pytest.fixture(scope="module", autouse=True)
def build_folder(tmp_path_factory):
    """Triton keeps its builds here and not in the user's cache."""
    before = os.environ.get("TRITON_CACHE_DIR")
    os.environ["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    yield
    if before is None:
        del os.environ["TRITON_CACHE_DIR"]
    else:
        os.environ["TRITON_CACHE_DIR"] = before


@needs_builds
@needs_compiler
@pytest.mark.parametrize(
    ("stage", "width", "dtype", "capability"),
    [
        *((stage, width, "bf16", 90) for stage in tiles.STAGES for width in LAYERS),
        # Elsewhere the kernel that needs the most registers, or comes near a limit.
        *(("query", 64, "bf16", 80), ("query", 32, "bf16", 120), ("query", 16, "fp32", 90)),
    ],
)
def test_builds_keep_to_registers_without_atomics(stage, width, dtype, capability):
    """All others: -m slow, and the table, which holds every row on every architecture."""
    check_build(build(stage, width, DTYPES[dtype], capability), stage, width, DTYPES[dtype])


@needs_builds
@needs_compiler
@pytest.mark.parametrize("stage", tiles.STAGES)
@pytest.mark.parametrize("width", [16, 64])
def test_the_table_holds_the_instructions_of_this_version(width, stage):
    """A change of the kernels shows here: count anew with every version then (`python -m sasa.kernels.tune`)."""
    side = LAYERS[width] if width == 64 else 56
    entry = tiles.table()[tiles.table_key(7, width, side, torch.bfloat16)][stage]
    tile = tuple(entry["tile"])
    figures = entry["builds"][tiles.tile_name(tile)].get(f"{builds.triton_version()} 90")
    if figures is None:
        pytest.skip(f"the table has no column for triton {builds.triton_version()}: its instructions are not checked")
    got = builds.compile_stage(stage, tile, tiles.Problem(8, width, side, side, 7), torch.bfloat16)
    assert builds.per_pixel(got, tile, side) == pytest.approx(figures[0], rel=0.01)
    assert got.registers == figures[1]


@needs_builds
@needs_compiler
@pytest.mark.parametrize("stage", tiles.STAGES)
def test_the_table_holds_what_keeping_nan_in_its_windows_adds(stage):
    """Counted without the function that a NaN calls; that it is there, `usual_way` checks."""
    entry = tiles.table()[tiles.table_key(7, 16, 56, torch.bfloat16)][stage]
    figures = entry["confining"].get(f"{builds.triton_version()} 90")
    if figures is None:
        pytest.skip(f"the table has no column for triton {builds.triton_version()}: its instructions are not checked")
    tile = tuple(entry["tile"])
    got = builds.compile_stage(stage, tile, tiles.Problem(8, 16, 56, 56, 7), torch.bfloat16, confine=True)
    assert builds.per_pixel(got, tile, 56) == pytest.approx(figures[0], rel=0.01)
    assert got.registers == figures[1] <= tune.MAX_REGISTERS
    assert got.stack <= tune.MAX_STACK and got.atomics == 0


@needs_builds
@needs_compiler
@pytest.mark.parametrize(
    ("stage", "most"), [("forward", (54, 62, 82)), ("query", (72, 82, 118)), ("key", (90, 102, 140))]
)
def test_instructions_a_query(stage, most):
    """Warp instructions a query at K = 7, bf16, compute capability 9.0: bounds that the kernels were written for."""
    if builds.triton_version() not in ("3.8", "3.9"):
        pytest.skip("the bounds hold with the compilers of triton 3.8 and 3.9: instructions are not checked here")
    for width, bound in zip((8, 16, 32), most, strict=True):
        side = LAYERS[width]
        call = tiles.Problem(8, width, side, side, 7)
        tile = tiles.tile_of(stage, call, torch.bfloat16)
        assert builds.per_pixel(build(stage, width, torch.bfloat16, 90), tile, side) <= bound, width


@pytest.mark.slow
@needs_builds
@needs_compiler
@pytest.mark.parametrize("stage", tiles.STAGES)
@pytest.mark.parametrize("capability", ARCHITECTURES)
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("width", LAYERS)
@pytest.mark.parametrize(
    "parts",
    [{}, {"mask": False}, {"content": False}, {"relative": False}, {"fused": False}],
    ids=lambda p: " ".join(p) or "all",
)
def test_every_build_keeps_to_registers_without_atomics(parts, width, dtype, capability, stage):
    check_build(build(stage, width, HALF[dtype], capability, **parts), stage, width, HALF[dtype], **parts)


@needs_builds
@needs_compiler
def test_the_predicted_instructions_of_the_stem_are_those_of_its_builds():
    """Of a batch of 128 images of 224, forward and backward; with triton 3.8 they differ by 0.1%."""
    if builds.triton_version() not in ("3.8", predictions.COUNTED_WITH["triton"]):
        pytest.skip("counted with triton 3.9: the stem's instructions are not checked here")
    sizes = triton_stem.Sizes.of((128, 3, 224, 224), heads=4, depth=16, mixtures=4, side=4, sliding=False)
    each = [builds.compile_stem(stage, "pooled").instructions["all"] for stage in ("forward", "backward")]
    executed = sum(each) * triton_stem.warps(sizes) * sizes.programs
    assert executed / 1e9 == pytest.approx(predictions.STEM_INSTRUCTIONS, rel=0.01)


def test_a_patch_that_no_border_clamps_has_the_tile_of_large_maps():
    """With border "zero" an 8x8 tile of a 7x7 map reads 14x14 pixels: at D = 64 it would spill 928 bytes."""
    sides = (1, 4, 5, 8, 9, 56)
    for stage, mask, side, size in itertools.product(tiles.STAGES, (True, False), sides, (3, 7, 8, 13)):
        row = tiles.row_of(stage, tiles.Problem(8, 64, side, 1, size, mask=mask), torch.bfloat16)
        own = 4 if side <= 4 else 8 if side <= 8 else 56
        wanted = own if mask or stage == "key" or (own == 4 and size <= 7) else 56
        assert row.split()[2] == f"map{wanted}"


@needs_builds
@needs_compiler
def test_border_zero_on_a_small_map_is_spared_what_the_docs_say():
    if builds.triton_version() != "3.8":
        pytest.skip("counted with triton 3.8: the figures of docs/kernels.md are not checked here")
    call = tiles.Problem(8, 64, 7, 7, 13, mask=False)
    clamped = tuple(tiles.table()["K13 d64 map8 half"]["query"]["tile"])
    before, after = (builds.compile_stage("query", tile, call, torch.bfloat16)
                     for tile in (clamped, tiles.tile_of("query", call, torch.bfloat16)))  # fmt: skip
    assert after.shared <= tune.MAX_SHARED
    text = (
        f"{after.stack} bytes of stack and {after.shared >> 10} KiB of shared memory instead of {before.stack:,} and "
    )
    assert f"{text}{before.shared >> 10}" in " ".join(DOCS.read_text(encoding="utf-8").split())


def test_the_table_has_a_row_for_every_call():
    for size, width, side, dtype in itertools.product(range(1, 14), range(1, 65), (1, 5, 9, 17, 500), DTYPES.values()):
        row = tiles.table()[tiles.table_key(size, width, side, dtype)]
        assert set(row) == set(tiles.STAGES)
    for row in tiles.table().values():
        for stage in row.values():
            height, width, rows, warps, unroll = stage["tile"]
            assert height * width >= 16  # what a product takes
            assert all(n & (n - 1) == 0 for n in (height, width, rows, warps)) and unroll in (0, 1)


def test_the_choice_follows_from_the_counts():
    for key, row in tiles.table().items():
        for stage, entry in row.items():
            assert tuple(entry["tile"]) == tune.choose(entry["builds"]), (key, stage)
            assert entry.get("instead", {}) == tune.instead(entry["builds"], entry["tile"]), (key, stage)


def test_what_spills_has_no_better_candidate():
    """More than 64 bytes of stack only where every candidate that has at most as much was counted to be dearer."""
    spilling = 0
    for (key, row), stage in itertools.product(tune.table_rows(), tiles.STAGES):
        entry = tiles.table()[key][stage]
        for version, capability in itertools.product(("3.3", "3.6", "3.8", "3.9"), (80, 90, 100, 120)):
            target = f"{version} {capability}"
            instructions, _, stack, _ = entry["builds"][tiles.tile_name(tiles.choice(entry, target))][target]
            if stack <= 64:
                continue
            spilling += 1
            for tile in tune.candidates(stage, *row):
                other = entry["builds"][tiles.tile_name(tile)][target]
                assert not tune.fits(other) or other[0] >= instructions, (key, stage, target, tile)
    assert spilling < 160


def test_another_tile_is_taken_where_the_chosen_one_spills_and_a_cheaper_one_fits():
    chosen, other, dearer = "2 8 8 1 0", "2 8 4 1 0", "2 8 2 1 0"
    found = {
        chosen: {"3.8 90": [50, 255, 0, 0], "3.8 80": [60, 255, 72, 0], "3.8 120": [60, 255, 72, 0], "3.9 80": None},
        other: {
            "3.8 90": [40, 128, 0, 0],
            "3.8 80": [59, 128, 64, 0],
            "3.8 120": [59, 128, 65, 0],
            "3.9 80": [1, 1, 0, 0],
        },
        dearer: {"3.8 80": [59.5, 128, 0, 0], "3.8 120": [61, 128, 0, 0]},
    }
    assert tune.instead(found, (2, 8, 8, 1, 0)) == {"3.8 80": [2, 8, 4, 1, 0]}


def test_nan_is_kept_in_its_windows_where_the_counts_allow_it():
    for key, row in tiles.table().items():
        for stage, entry in row.items():
            before = entry["builds"][tiles.tile_name(entry["tile"])]
            for column, after in entry.get("confining", {}).items():
                allowed = after is not None  # it compiles
                if allowed:
                    allowed = after[0] / before[column][0] <= 1.03 and after[2] <= max(64, before[column][2])
                assert tiles.confines(stage, key, column) == (allowed and column not in entry.get("instead", {}))


def test_nan_is_kept_in_its_windows_where_it_was_counted_only():
    large, patch = (tiles.table_key(7, 16, side, torch.bfloat16) for side in (56, 7))
    assert tiles.table()[patch]["forward"]["confining"]["3.8 100"] is None  # it does not compile
    assert not tiles.confines("forward", patch, "3.8 100")
    assert tiles.confines("forward", large, "3.8 90")
    assert not tiles.confines("forward", patch, "3.8 90")
    assert not tiles.confines("forward", large, "3.8 89")
    assert not tiles.confines("forward", large, "3.10 90")


def test_dearer_or_spilling_builds_do_not_keep_nan_in_its_windows(monkeypatch):
    entry = {"tile": [2, 8, 8, 1, 0], "builds": {"2 8 8 1 0": {"3.8 90": [100.0, 168, 0, 0]}}}

    def confines(*figures):
        tiles.confines.cache_clear()
        monkeypatch.setattr(tiles, "table", lambda: {"row": {"key": entry | {"confining": {"3.8 90": figures}}}})
        return tiles.confines("key", "row", "3.8 90")

    assert confines(103.0, 255, 64, 0)
    assert not confines(103.1, 168, 0, 0)
    assert not confines(90.0, 168, 72, 0)
    entry["instead"] = {"3.8 80": [2, 8, 4, 1, 0]}
    assert confines(103.0, 255, 64, 0)
    entry["instead"] = {"3.8 90": [2, 8, 4, 1, 0]}  # another tile than the one that was counted
    assert not confines(103.0, 255, 64, 0)
    tiles.confines.cache_clear()


def warps_with_and_without(stage, key, column):
    """Warps of a kernel that a multiprocessor holds, where it keeps NaN in its windows and where it does not."""
    entry = tiles.table()[key][stage]
    tile = tiles.tile_name(entry["tile"])
    counts = entry["confining"][column], entry["builds"][tile][column]
    return [builds.warps_resident(registers, shared, entry["tile"][3]) for _, registers, _, shared in counts]


def test_the_counts_in_the_docs_are_those_of_the_table():
    docs = DOCS.read_text(encoding="utf-8")
    assert tune.confining(7) in docs
    assert tune.show(7) in docs
    assert tune.coverage() in docs
    lines = []
    for size in tiles.WINDOWS:
        rows = [key for key, row in tune.table_rows() if row[0] == size]
        targets = [f"{v} {c}" for v, c in itertools.product(("3.3", "3.6", "3.8", "3.9"), (80, 90, 100, 120))]
        asked = [list(itertools.product((stage,), rows, targets)) for stage in tiles.STAGES]
        assert [len(questions) for questions in asked] == [192] * 3
        counts = [sum(tiles.confines(*question) for question in questions) for questions in asked]
        lines.append(f"| {size}x{size} | {' | '.join(map(str, counts))} |")
    assert "\n".join(lines) in docs
    asked = list(itertools.product(tiles.STAGES, tune.table_rows(), targets))
    small = [(stage, key, target) for stage, (key, row), target in asked if row[2] <= 8]
    confining = [sum(tiles.confines(*question) for question in questions)
                 for questions in ([(stage, key, target) for stage, (key, _), target in asked], small)]  # fmt: skip
    text = " ".join(docs.split())
    assert f"All {len(asked):,} programs" in text and f"a side, and {confining[0]:,} confine;" in text
    assert f"{confining[1]} of their {len(small):,} do" in text
    failed = [(key, stage, target) for stage, (key, _), target in asked
              if tiles.table()[key][stage]["confining"][target] is None]  # fmt: skip
    four = [question for question in failed if tiles.table()[question[0]][question[1]]["tile"][3] == 4]
    every = [q for q in asked if tiles.table()[q[1][0]][q[0]]["tile"][3] == 4 and q[2].endswith(" 100")]
    assert len(four) == len(failed) == len(every) and all(5 <= row[2] <= 8 for _, (_, row), _ in every)
    assert f"a tile of four warps: {len(failed)} programs" in text
    for of_small, maps in ((False, "large maps"), (True, "smaller ones")):
        questions = [(stage, key, target) for stage, (key, row), target in asked
                     if target.endswith(" 90") and (row[2] <= 8) == of_small]  # fmt: skip
        warps = [warps_with_and_without(*question) for question in questions if tiles.confines(*question)]
        fewer = [after / before for after, before in warps if after < before]
        assert f"in {len(fewer)} of the {len(warps)} on {maps} ({min(fewer):.2f} of them at worst)" in text
    assert (
        f"{sum(len(e.get('instead', {})) for row in tiles.table().values() for e in row.values())} targets of" in docs
    )


def test_every_version_has_counted_every_row():
    for key, row in tiles.table().items():
        for stage, entry in row.items():
            columns = set(entry["builds"][tiles.tile_name(entry["tile"])])
            assert {"3.3 90", "3.6 90", "3.8 90", "3.9 90"} <= columns, (key, stage)


def test_a_choice_fits_everywhere_or_is_the_cheapest():
    a, b, c = "2 8 8 1 0", "2 8 4 1 0", "2 8 2 1 0"
    counts = {a: {"3.8 90": [55, 200, 0, 0], "3.9 90": [55, 200, 0, 0]}, b: {"3.8 90": [59, 128, 0, 0]}}
    counts[b]["3.9 90"] = [59, 128, 0, 0]
    assert tune.choose(counts) == (2, 8, 8, 1, 0)
    counts[a]["3.8 80"] = [50, 255, 65, 0]  # spills with one version on one architecture
    assert tune.choose(counts) == (2, 8, 8, 1, 0)  # on which the other was not counted
    counts[b]["3.8 80"] = [59, 128, 0, 0]
    assert tune.choose(counts) == (2, 8, 4, 1, 0)
    counts[c] = {
        "3.8 90": [61, 64, 0, 0],
        "3.9 90": [61, 64, 0, 0],
        "3.8 80": [61, 64, 0, 0],
    }  # within 5%, and twice the warps
    assert tune.choose(counts) == (2, 8, 2, 1, 0)
    much_cheaper = counts | {a: {v: [50, *figures[1:]] for v, figures in counts[a].items()}}
    assert tune.choose(much_cheaper) == (2, 8, 8, 1, 0)
    spilling = {tile: {v: [*f[:2], 99, 0] for v, f in x.items()} for tile, x in counts.items()}
    assert tune.choose(spilling) == (2, 8, 8, 1, 0)


def test_executed_instructions_count_loops_by_their_trips():
    lines = ["MOV R1, R2", ".L_1:", "LDG R1", ".L_2:", "@!P0 HMMA R1", "@P1 BRA `(.L_2)", "@P0 BRA `(.L_1)", "EXIT"]
    listing = "\n".join(x if x.endswith(":") else f"        /*0010*/   {x} ;" for x in lines)
    found = builds.executed(listing, (8, 3))
    assert (found["MOV"], found["LDG"], found["HMMA"]) == (1, 8, 24)
    assert found["all"] == 2 + 8 * 2 + 24 * 2
    assert builds.executed(listing, (8,))["HMMA"] == 8  # an inner loop whose trips are not known counts once


def test_the_repair_after_a_nan_is_not_counted():
    """But is there: a function that one call reaches, behind a conditional exit."""
    kernel = "MOV R1, R2 ;\n@!P0 EXIT ;\nMOV R3, R4 ;\nCALL.REL.NOINC `($key_kernel$a_repair_key_x) ;\nEXIT ;\n"
    function = "  .type  $key_kernel$a_repair_key_x,@function\n$key_kernel$a_repair_key_x:\nFADD R1, R2 ;\n"
    assert builds.usual_way(kernel + function) == kernel
    assert builds.usual_way("MOV R1, R2 ;\nEXIT ;\n") == "MOV R1, R2 ;\nEXIT ;\n"
    for wrong in (kernel, kernel.replace("@!P0 EXIT", "MOV") + function, "EXIT ;\n" + function, kernel * 2 + function):
        with pytest.raises(ValueError, match="not repaired"):
            builds.usual_way(wrong)


@needs_builds
@needs_compiler
def test_products_are_as_many_as_the_pairs_need():
    """Counted instructions stand and fall with the trips of loops: the products' number is known beforehand."""
    assert tiles.table()[tiles.table_key(7, 16, 28, torch.bfloat16)]["forward"]["tile"] == [2, 8, 8, 1, 0]
    for chunk in (8, 4):  # in one chunk, which another test has built, and in a loop of two
        tile, call = (2, 8, chunk, 1, 0), tiles.Problem(8, 16, 28, 28, 7)
        found = builds.compile_stage("forward", tile, call, torch.bfloat16).instructions["HMMA"]
        assert found == (16 * 128 * 16 * 2 + 16 * 16 * 16) / (16 * 8 * 16)  # q.k and P.v, the embeddings
