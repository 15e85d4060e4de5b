"""Backend "triton" without a GPU: numbers by Triton's interpreter, builds by its compiler, mutants; and on a GPU.

The interpreter runs in a process of its own (tests/triton_cases.py). The full product of sizes, types and builds:
python -m pytest tests/kernels/test_triton.py -m slow.
"""

import importlib.util
import itertools
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import triton_cases
from sasa import kernels
from sasa.kernels import dispatch, tune
from sasa.kernels import triton_backend as cuda
from sasa.kernels import triton_builds as builds
from sasa.kernels import triton_tiles as tiles
from sasa.kernels.interface import CallKind

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
DTYPES = {"fp32": torch.float32} | HALF
LIMIT = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}  # of the largest value

refused = cuda.cannot_compile()
needs_triton = pytest.mark.skipif(
    refused is not None, reason=f"{refused}; what the kernels compute is not checked here"
)
needs_builds = pytest.mark.skipif(
    refused is not None,
    reason=f"{refused}; registers, stack, shared memory, load widths and atomics of builds are not checked here",
)
needs_compiler = pytest.mark.skipif(
    cuda.interpreted(), reason="TRITON_INTERPRET is set: this process cannot compile kernels"
)


def case(heads, width, size, height, map_width, border="mask", content=True, embeddings=True, scale=1.0, batch=1):
    return (batch, heads, width, size, height, map_width, border, content, embeddings, scale)


def label(c):
    batch, heads, width, size, height, map_width, border, content, embeddings, scale = c
    text = f"B{batch}N{heads}D{width}-K{size}-{height}x{map_width}-{border}"
    text += ("" if content else "-nokey") + ("" if embeddings else "-norel")
    return text if scale == 1 else f"{text}-scale{scale}"


# ---- numbers -------------------------------------------------------------------------------------------------------

# Every K of the paper and others, every width, maps smaller than the window, as large as the patch, and larger than it
# both ways, prime, single rows, columns and pixels; both borders; without embeddings, without keys.
CASES = [
    case(2, 8, 7, 5, 9),
    case(1, 16, 7, 11, 12),
    case(1, 8, 7, 5, 6, "zero"),
    case(1, 4, 3, 5, 7, batch=2),
    case(1, 16, 3, 9, 10, "zero"),
    case(1, 12, 5, 7, 11),
    case(1, 32, 5, 1, 9),
    case(1, 32, 7, 8, 10),
    case(2, 64, 7, 7, 7),
    case(1, 64, 5, 4, 4, "zero"),
    case(1, 24, 9, 6, 13),
    case(1, 8, 9, 5, 3, "zero"),
    case(1, 16, 11, 3, 17),
    case(1, 64, 11, 5, 6),
    case(1, 32, 13, 7, 5),
    case(1, 8, 1, 3, 4),
    case(1, 16, 2, 4, 5),
    case(1, 8, 4, 7, 9, "zero"),
    case(1, 6, 6, 5, 7),
    case(1, 10, 12, 5, 6),
    case(3, 4, 7, 1, 1),
    case(1, 16, 7, 9, 1, "zero"),
    case(1, 16, 7, 5, 9, content=False),
    case(1, 32, 5, 5, 6, "zero", content=False),
    case(1, 8, 7, 9, 5, embeddings=False),
    case(1, 5, 3, 6, 7, embeddings=False),  # without embeddings an odd head width is fine
    case(1, 1, 4, 4, 5, "zero", embeddings=False),
    case(1, 16, 7, 5, 6, scale=0.25),
    case(1, 8, 3, 4, 5, scale=-0.5),
    case(1, 8, 3, 4, 5, scale=0.0),
]
NARROW_CASES = [case(1, 8, 7, 9, 15), case(1, 64, 7, 7, 7), *(CASES[i] for i in (0, 3, 10, 12, 22, 24))]


def check(found, dtype):
    """The largest error stays below a limit; the root mean square, in half types, below that of plain PyTorch.

    Not the largest again: on a small map it is a few roundings that happen to add up, in either of the two.
    """
    for name, (error, rms, plain, largest) in found.items():
        is_zero = largest < 1e-9  # the exact gradient: an error in absolute terms
        scale = 1.0 if is_zero else largest
        assert error <= LIMIT[dtype] * scale, f"{name}: off by {error} of {largest}"
        if dtype != torch.float32:  # a rounding of the result is what even an exact computation would have
            few = is_zero or name in ("rel_row", "rel_col")  # numbers, each a sum over the map: room for chance
            bound = plain + torch.finfo(dtype).eps * scale * (1 / 2 if few else 1 / 8)
            assert rms <= bound, f"{name}: off by {rms} (root mean square), plain types {plain}"


@needs_triton
@pytest.mark.parametrize("c", CASES, ids=label)
def test_fp32_matches_the_reference(c, interpreter):
    check(interpreter(triton_cases.errors, c, torch.float32), torch.float32)


@needs_triton
@pytest.mark.parametrize(
    ("c", "dtype"),
    [*((c, "bf16") for c in NARROW_CASES), *((c, "fp16") for c in NARROW_CASES[:3])],
    ids=lambda x: x if isinstance(x, str) else label(x),
)
def test_half_types_match_the_reference_better_than_plain_half_arithmetic(c, dtype, interpreter):
    check(interpreter(triton_cases.errors, c, HALF[dtype]), HALF[dtype])


@needs_triton
def test_the_interpreter_is_repaired_for_bf16(interpreter):
    """It rounds to nearest and multiplies values, as a GPU does: else the tests above would judge another machine."""
    got, wanted = interpreter(triton_cases.bf16_in_the_interpreter)
    for x, y in zip(got, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)


PRODUCT = [
    case(1, width, size, *shape, border, *parts)
    for size, width, shape, border in itertools.product(
        (3, 5, 7, 9, 11), (4, 8, 16, 32, 64), ((1, 9), (5, 3), (7, 7), (13, 18)), kernels.BORDERS
    )
    for parts in ((True, True), (False, True), (True, False))
    if parts == (True, True) or width == 16
]


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("c", PRODUCT, ids=label)
def test_the_full_product_matches_the_reference(c, dtype, interpreter):
    check(interpreter(triton_cases.errors, c, DTYPES[dtype]), DTYPES[dtype])


@needs_triton
@pytest.mark.parametrize("layout", triton_cases.LAYOUTS)
def test_any_strides(layout, interpreter):
    found = interpreter(triton_cases.errors_of_layout, case(2, 4, 3, 3, 5, batch=2), layout)
    assert max(found.values()) < 1e-5, found


@needs_triton
@pytest.mark.parametrize("content", [True, False])
def test_slices_of_a_fused_projection_are_not_copied(content, interpreter):
    """Only the output is allocated; the gradients are written to the slices of one tensor."""
    found, copies = interpreter(triton_cases.errors_of_fused, case(2, 8, 3, 5, 6, content=content, batch=2), True)
    assert max(found.values()) < 1e-5, found
    # The gradient of the output arrives channels innermost, as everything else.
    assert copies == 0


@needs_triton
def test_a_fused_projection_in_another_layout_is_right_too(interpreter):
    found, copies = interpreter(triton_cases.errors_of_fused, case(2, 8, 3, 5, 6, batch=2), False)
    assert max(found.values()) < 1e-5, found
    assert copies > 0


# ---- the operator --------------------------------------------------------------------------------------------------

SMALL = case(2, 8, 3, 3, 5, batch=2)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
def test_calls_repeat_bit_for_bit(dtype, interpreter):
    assert interpreter(triton_cases.repeats_bit_for_bit, case(1, 8, 3, 5, 9), DTYPES[dtype])


@needs_triton
def test_it_compiles_without_a_graph_break(interpreter):
    assert interpreter(triton_cases.compiles_without_a_break, SMALL) == 0


@needs_triton
@pytest.mark.parametrize(("content", "embeddings"), [(True, True), (False, True), (True, False)])
def test_opcheck(content, embeddings, interpreter):
    interpreter(triton_cases.opcheck, case(1, 4, 3, 3, 4, content=content, embeddings=embeddings))


@needs_triton
def test_autocast(interpreter):
    assert interpreter(triton_cases.autocast_equals_narrow_inputs, SMALL, torch.bfloat16)


@needs_triton
def test_an_empty_batch(interpreter):
    assert interpreter(triton_cases.empty_batch, SMALL)


# ---- the choice ----------------------------------------------------------------------------------------------------


@needs_triton
def test_the_interpreter_serves_by_name_only(interpreter):
    assert interpreter(triton_cases.chosen, (1, 1, 2, 3, 3), 3) != "triton"
    assert interpreter(triton_cases.chosen, (1, 1, 2, 3, 3), 3, "triton") == "triton"


@needs_triton
def test_what_it_does_not_take_is_named(interpreter):
    assert "14" in interpreter(triton_cases.refusal, (1, 1, 2, 3, 3), 14, torch.float32)
    assert "65" in interpreter(triton_cases.refusal, (1, 1, 65, 3, 3), 3, torch.float32)
    assert "float64" in interpreter(triton_cases.refusal, (1, 1, 2, 3, 3), 3, torch.float64)
    assert interpreter(triton_cases.refusal, (1, 1, 64, 3, 3), 13, torch.float32) is None


@needs_compiler
def test_cpu_tensors_are_refused_without_the_interpreter():
    assert "cuda" in cuda.unsupported(CallKind(torch.device("cpu"), torch.float32, 2, 3))


@needs_compiler
def test_the_next_best_backend_serves_what_it_refuses(monkeypatch):
    """On a CUDA machine; the tensors here only say that they are on one."""
    monkeypatch.setattr(cuda, "unusable", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))

    def on_gpu(width, dtype=torch.bfloat16):
        return SimpleNamespace(device=torch.device("cuda"), dtype=dtype, shape=torch.Size((1, 1, width, 3, 3)))

    assert kernels.choose_backend(on_gpu(64), 13) == "triton"
    assert kernels.choose_backend(on_gpu(65), 13) == "tiled"
    assert kernels.choose_backend(on_gpu(64), 14) == "tiled"
    assert kernels.choose_backend(on_gpu(64, torch.float64), 13) == "tiled"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    dispatch.forget()
    assert kernels.choose_backend(on_gpu(64), 13) == "tiled"


@needs_compiler
def test_without_triton_or_a_gpu_there_is_a_reason(monkeypatch):
    if not torch.cuda.is_available() and refused is None:
        assert cuda.unusable() == "no CUDA device"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "triton is not installed" in cuda.unusable()


@pytest.mark.parametrize("version", ["3.2.0", "2.3.1"])
def test_a_triton_without_gather_is_refused(version, monkeypatch, tmp_path):
    """Neither compiled nor interpreted, with a reason of one line, and before it is imported."""
    file = tmp_path / "__init__.py"
    file.write_text(f'"""isort:skip_file"""\n__version__ = \'{version}\'\n')
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(origin=str(file)))
    for interpreted in (False, True):
        monkeypatch.setattr(cuda, "interpreted", lambda interpreted=interpreted: interpreted)
        assert cuda.unusable() == f"triton {version[:3]} is installed, it needs 3.3 or newer"
    with pytest.raises(ValueError, match=r"triton [23]\.[23] is installed"):
        kernels.local_attention(*[torch.zeros(1, 1, 2, 3, 3)] * 3, None, None, kernel_size=3, backend="triton")


def test_a_newer_triton_is_not_refused(monkeypatch, tmp_path):
    file = tmp_path / "__init__.py"
    file.write_text("__version__ = '3.10.0'\n")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(origin=str(file)))
    assert cuda.cannot_compile() is None


def test_triton_is_imported_by_the_first_call_only():
    program = "import sys, sasa.kernels.triton_backend as cuda; cuda.unusable(); sys.exit('triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=Path(kernels.__file__).parents[2], timeout=120)
    assert done.returncode == 0


# ---- mutants -------------------------------------------------------------------------------------------------------

LARGE, WHOLE = case(1, 8, 3, 9, 5), case(1, 8, 7, 5, 5)  # higher than the patch, in one patch
MUTANTS = {
    "no patch clamp": ("first = tl.maximum(first, 0)", "first = first", WHOLE),
    "patch clamped to the first rows": (
        "first = tl.maximum(first, 0)", "first = tl.minimum(tl.maximum(first, 0), 1)", LARGE,
    ),
    "flipped offset": ("shift_row = (top - row +", "shift_row = (row - top +", LARGE),
    "flipped offset, key kernel": ("key_row = (row - top +", "key_row = (top - row +", LARGE),
    "window of an even K the other way": (
        "_origin(row - (K - 1) // 2, MASK)", "_origin(row - K // 2, MASK)", case(1, 8, 4, 6, 5, "zero"),
    ),
    "queries of an even K the other way": (
        "_origin(row - K // 2, True)", "_origin(row - (K - 1) // 2, True)", case(1, 8, 4, 6, 5),
    ),
    "no border mask, rows": ("_counted(top, place, H, MASK)", "(place >= 0)", case(1, 8, 3, 5, 4)),
    "no border mask, columns": ("_counted(left, place, W, MASK)", "(place >= 0)", case(1, 8, 3, 4, 5)),
    "border always masked": ("_counted(top, place, H, MASK)", "(top + place < H)", case(1, 8, 3, 5, 6, "zero")),
    "keys outside a zero border": ("(top + row >= 0) &", "(top + row >= -9) &", case(1, 8, 3, 5, 6, "zero")),
    "queries outside the map": ("mask=inside, other=-FLOOR", "mask=inside, other=0.0", case(1, 8, 3, 5, 4)),
    "swapped embeddings": ("tl.load(rel_row + channel", "tl.load(rel_col + channel", case(1, 8, 3, 5, 6)),
    "swapped halves of their gradient": ("tl.where(channel < half, slot,", "tl.where(channel >= half, slot,",
                                         case(1, 8, 3, 5, 6)),
    "no fade of the online softmax": ("total * fade", "total", case(1, 8, 9, 5, 6)),
    "no delta": ("tl.broadcast_to(-mean[:, None]", "tl.broadcast_to(0 * mean[:, None]", case(1, 8, 3, 5, 6)),
    "no scale": ("grad_k * scale", "grad_k", case(1, 8, 3, 5, 6, scale=0.25)),
    "rows beyond the strip": ("tl.minimum(strip * STRIP + STRIP, tiles_h)", "tiles_h", case(1, 8, 3, 33, 2)),
}  # fmt: skip


@pytest.fixture(scope="module")
def right_cases():
    """Those that the kernels without a mistake were checked on."""
    return set()


@needs_triton
@pytest.mark.parametrize("which", MUTANTS)
def test_mutants_are_seen(which, interpreter, right_cases, tmp_path):
    """Each is a mistake that is easily made; the same case without it is right."""
    old, new, c = MUTANTS[which]
    source = (Path(cuda.__file__).parent / "triton_kernels.py").read_text()
    assert old in source
    if c not in right_cases:
        check(interpreter(triton_cases.errors, c, torch.float32), torch.float32)
        right_cases.add(c)
    mutant = tmp_path / "mutant.py"
    mutant.write_text(source.replace(old, new))
    with pytest.raises(AssertionError, match="off by"):
        check(interpreter(triton_cases.errors_of_mutant, mutant, c), torch.float32)


# ---- builds --------------------------------------------------------------------------------------------------------

LAYERS = {8: 56, 16: 28, 32: 14, 64: 7}  # head width -> map, the stages of a ResNet
ARCHITECTURES = (80, 90, 100)


def build(stage, width, dtype, capability, kernel_size=7, **parts):
    side = LAYERS[width]
    call = tiles.Problem(8, width, side, side, kernel_size, **parts)
    return builds.compile_stage(stage, tiles.tile_of(stage, call, dtype), call, dtype, capability=capability)


def check_build(got, stage, width, dtype):
    """The same on every version of triton: a few spilled bytes come and go with the version, and cost little.

    Where no tile keeps to MAX_STACK on every version, the table shows what the one with the fewest instructions needs.
    """
    entry = tiles.table()[tiles.table_key(7, width, LAYERS[width], dtype)][stage]
    spilled = max(figures[2] for figures in entry["builds"][tune.name(entry["tile"])].values())
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
        *(("query", 64, "bf16", 80), ("key", 64, "bf16", 100), ("query", 32, "bf16", 120)),
        *(("forward", 8, "fp16", 90), ("query", 16, "fp32", 90)),
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
    figures = entry["builds"][tune.name(tile)].get(f"{builds.triton_version()} 90")
    if figures is None:
        pytest.skip(f"the table has no column for triton {builds.triton_version()}: its instructions are not checked")
    got = builds.compile_stage(stage, tile, tiles.Problem(8, width, side, side, 7), torch.bfloat16)
    assert builds.per_pixel(got, tile, side) == pytest.approx(figures[0], rel=0.01)
    assert got.registers == figures[1]


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
    check_build(build(stage, width, HALF[dtype], capability, **parts), stage, width, HALF[dtype])


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


def test_the_counts_in_the_docs_are_those_of_the_table():
    docs = (Path(kernels.__file__).parents[2] / "docs" / "kernels.md").read_text(encoding="utf-8")
    assert tune.show(7) in docs
    assert tune.coverage() in docs


def test_every_version_has_counted_every_row():
    for key, row in tiles.table().items():
        for stage, entry in row.items():
            columns = set(entry["builds"][tune.name(entry["tile"])])
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


@needs_builds
@needs_compiler
def test_products_are_as_many_as_the_pairs_need():
    """Counted instructions stand and fall with the trips of loops: the products' number is known beforehand."""
    assert tiles.table()[tiles.table_key(7, 16, 28, torch.bfloat16)]["forward"]["tile"] == [2, 8, 8, 1, 0]
    for chunk in (8, 4):  # in one chunk, which another test has built, and in a loop of two
        tile, call = (2, 8, chunk, 1, 0), tiles.Problem(8, 16, 28, 28, 7)
        found = builds.compile_stage("forward", tile, call, torch.bfloat16).instructions["HMMA"]
        assert found == (16 * 128 * 16 * 2 + 16 * 16 * 16) / (16 * 8 * 16)  # q.k and P.v, the embeddings


# ---- GPU -----------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("c", CASES, ids=label)
def test_on_the_gpu_it_matches_the_reference(c, dtype):
    check(triton_cases.errors(c, DTYPES[dtype], "cuda"), DTYPES[dtype])


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("layout", triton_cases.LAYOUTS)
def test_on_the_gpu_any_strides(layout):
    assert max(triton_cases.errors_of_layout(SMALL, layout, "cuda").values()) < 1e-5


@pytest.mark.gpu
@needs_triton
def test_on_the_gpu_calls_repeat_bit_for_bit_and_compile():
    assert triton_cases.repeats_bit_for_bit(case(8, 16, 7, 28, 28, batch=4), torch.bfloat16, "cuda")
    assert triton_cases.compiles_without_a_break(SMALL, "cuda") == 0
    triton_cases.opcheck(SMALL, "cuda")


@pytest.mark.gpu
@needs_triton
def test_on_the_gpu_a_call_is_captured_by_a_cuda_graph():
    inputs, direction = triton_cases.draw(case(8, 16, 7, 28, 28, batch=4))
    inputs = triton_cases.cast(inputs, torch.bfloat16, "cuda")
    leaves = [x.requires_grad_() for x in inputs.values()]
    direction = direction.to(leaves[0])

    def run():
        out = kernels.local_attention(*leaves, kernel_size=7, backend="triton")
        return out, *torch.autograd.grad(out, leaves, direction)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        wanted = run()  # builds the kernels
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(x, y) for x, y in zip(got, wanted, strict=True))
