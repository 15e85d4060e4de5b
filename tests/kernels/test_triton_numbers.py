"""Backend "triton": what the kernels compute, against the definition in fp64, in Triton's interpreter and on a GPU.

The interpreter runs in a process of its own (tests/triton_cases.py). The full product of sizes and types:
python -m pytest tests/kernels/test_triton_numbers.py -m slow.
"""

import itertools

import pytest
import torch

import triton_cases
from sasa import kernels
from sasa.kernels import triton_tiles as tiles
from triton_cases import DTYPES, HALF, case, check, needs_triton

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
    case(1, 8, 8, 5, 11),
    case(1, 16, 10, 3, 12, "zero"),
]
# fp32 has one tile, of 4 x 4 with a row of the patch at a time: the cases that differ for it.
FP32_CASES = [CASES[i] for i in (3, 5, 6, 11, 13, 15, 16, 17, 20, 23, 25, 29)]
NARROW_CASES = [case(1, 8, 7, 9, 15), case(1, 64, 7, 7, 7), *(CASES[i] for i in (0, 3, 10, 12, 22, 24))]


@needs_triton
@pytest.mark.parametrize("c", CASES, ids=str)
def test_programs_of_half_types_match_the_reference(c, interpreter):
    """In fp32, so that a mistake that rounding would hide shows."""
    check(interpreter(triton_cases.errors_of_half_programs, c), torch.float32)


@needs_triton
@pytest.mark.parametrize("c", FP32_CASES, ids=str)
def test_fp32_matches_the_reference(c, interpreter):
    check(interpreter(triton_cases.errors, c, torch.float32), torch.float32)


@needs_triton
@pytest.mark.parametrize(
    ("c", "dtype"),
    [*((c, "bf16") for c in NARROW_CASES), *((c, "fp16") for c in NARROW_CASES[:3])],
    ids=str,
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
@pytest.mark.parametrize("c", PRODUCT, ids=str)
def test_the_full_product_matches_the_reference(c, dtype, interpreter):
    check(interpreter(triton_cases.errors, c, DTYPES[dtype]), DTYPES[dtype])


@needs_triton
@pytest.mark.parametrize("layout", triton_cases.LAYOUTS)
def test_any_strides(layout, interpreter):
    found = interpreter(triton_cases.errors_of_layout, case(2, 4, 3, 3, 5, batch=2), layout)
    assert max(found.values()) < 1e-5, found


@needs_triton
@pytest.mark.parametrize(
    "c", [case(2, 8, 3, 3, 5, batch=2), case(2, 8, 3, 3, 5, content=False, batch=2), case(1, 16, 7, 3, 17)], ids=str
)
def test_slices_of_a_fused_projection_are_not_copied(c, interpreter):
    """Only the output is allocated; the gradients are written to the slices of one tensor."""
    found, copies = interpreter(triton_cases.errors_of_fused, c, True)
    assert max(found.values()) < 1e-5, found
    # The gradient of the output arrives channels innermost, as everything else.
    assert copies == 0


@needs_triton
def test_a_fused_projection_in_another_layout_is_right_too(interpreter):
    found, copies = interpreter(triton_cases.errors_of_fused, case(2, 8, 3, 3, 5, batch=2), False)
    assert max(found.values()) < 1e-5, found
    assert copies > 0


@needs_triton
@pytest.mark.parametrize(
    "c", [case(1, 32, 7, 3, 10), case(1, 64, 3, 5, 8), case(1, 32, 5, 3, 10), case(1, 32, 13, 3, 8)], ids=str
)
def test_tiles_that_some_targets_have_instead_are_right_too(c, interpreter):
    found, count = interpreter(triton_cases.errors_of_other_tiles, c)
    assert count > 0
    check(found, torch.float32)


NAN, INF = float("nan"), float("inf")
# Both windows, both borders, an even window, one in several chunks, without keys, without embeddings; small maps.
CONFINED = [
    case(1, 8, 3, 5, 9),
    case(1, 16, 7, 3, 10),
    case(1, 16, 7, 3, 10, "zero"),
    case(1, 8, 4, 3, 9),
    case(1, 8, 9, 2, 11),
    case(1, 8, 3, 3, 9, content=False),
    case(1, 8, 3, 3, 9, embeddings=False),
    case(1, 16, 3, 4, 4),
    case(1, 16, 5, 7, 7),
    case(1, 16, 7, 7, 6, "zero"),
    case(2, 8, 3, 3, 8),
]
LOST = [("query", INF), ("key", NAN), ("key", INF), ("value", NAN), ("grad", NAN)]


@needs_triton
@pytest.mark.parametrize("confine", [True, False])
@pytest.mark.parametrize(("name", "value"), LOST)
def test_what_is_not_finite_is_lost_nowhere(name, value, confine, interpreter):
    """A window that holds it gives no finite number, nor does a gradient that comes from such a window."""
    found = interpreter(triton_cases.finite_by_mistake, case(1, 8, 7, 4, 10), name, value, 2, 5, confine)
    assert not any(found.values()), found


@needs_triton
@pytest.mark.parametrize("name", ["query", "key", "value", "grad"])
@pytest.mark.parametrize("c", CONFINED, ids=str)
def test_what_is_not_finite_stays_in_the_windows_that_hold_it(c, name, interpreter):
    """All others, and the gradients that come from others alone, have the bits that they have without it."""
    if name != "key" or c.content:
        found = interpreter(triton_cases.spread, c, name, (NAN, INF, -INF), 1, 2)
        assert not any(found.values()), found


@needs_triton
@pytest.mark.parametrize("name", ["query", "key", "value", "grad"])
def test_it_stays_there_in_bf16_and_a_fused_projection(name, interpreter):
    found = interpreter(triton_cases.spread, case(1, 16, 7, 3, 10), name, (NAN, INF), 1, 2, torch.bfloat16, True)
    assert not any(found.values()), found


@needs_triton
@pytest.mark.parametrize("name", ["query", "key", "value", "grad"])
@pytest.mark.parametrize("c", [case(1, 16, 5, 3, 10), case(1, 8, 7, 5, 9), case(1, 8, 13, 2, 14, "zero")], ids=str)
def test_it_stays_there_in_the_programs_of_fp32(c, name, interpreter):
    found = interpreter(triton_cases.spread, c, name, (NAN, -INF), 1, 2, torch.float32, False, None, True, True)
    assert not any(found.values()), found


@needs_triton
@pytest.mark.parametrize("name", ["query", "key", "value", "grad"])
def test_it_stays_in_its_head_where_a_program_serves_several(name, interpreter):
    found = interpreter(
        triton_cases.spread, case(2, 8, 3, 2, 9), name, (NAN,), 1, 2, torch.float32, False, {"ENOUGH": 1}
    )
    assert not any(found.values()), found


@needs_triton
def test_without_that_it_spreads_over_its_tile(interpreter):
    found = interpreter(triton_cases.spread, CONFINED[0], "key", (NAN,), 1, 2, torch.float32, False, None, False)
    assert all(found.values()), found


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
def test_finite_inputs_give_the_same_bits_with_and_without_that(dtype, interpreter):
    assert interpreter(triton_cases.confined_and_not, case(1, 8, 3, 5, 9), DTYPES[dtype])


# ---- sizes ---------------------------------------------------------------------------------------------------------


@needs_triton
@pytest.mark.parametrize(
    ("enough", "heads", "parts"),
    [(1, 4, (True, True)), (4, 2, (True, True)), (1, 4, (False, True)), (1, 4, (True, False))],
)
def test_a_program_serves_several_heads_in_turn(enough, heads, parts, interpreter):
    """As on a GPU, where many tiles are enough to fill it; the calls above have a program a head."""
    c = case(4, 8, 3, 3, 5, "mask", *parts)
    assert interpreter(triton_cases.heads_with, {"ENOUGH": enough}, c) == heads
    check(interpreter(triton_cases.errors_with, {"ENOUGH": enough}, c), torch.float32)


@needs_triton
def test_a_program_serves_several_heads_of_a_fused_projection(interpreter):
    found, copies = interpreter(triton_cases.errors_of_fused, case(4, 8, 7, 2, 9), True, {"ENOUGH": 1})
    assert max(found.values()) < 1e-5 and copies == 0, found


@needs_triton
def test_batches_beyond_the_grid_and_strips_of_one_tile(interpreter):
    found = interpreter(triton_cases.errors_with, {"MAX_GRID": 3, "STRIP": 1}, case(1, 8, 3, 9, 3, batch=4))
    check(found, torch.float32)


@needs_triton
def test_a_map_of_more_than_2_to_the_31_elements(interpreter):
    """Rows so far apart that the last one's offset needs 64 bits; the memory between them is never touched."""
    assert interpreter(triton_cases.error_of_far_rows, 7, 420_000_000) < 1e-5


@needs_triton
def test_a_patch_beyond_32_bits_is_refused(interpreter):
    with pytest.raises(ValueError, match=r"6 rows of a map span \d+ elements in memory, it takes up to 2147483647"):
        interpreter(triton_cases.error_of_far_rows, 7, 430_000_000)


def test_limits_of_sizes():
    """A fused projection of 512 channels and 1183 x 1183 pixels has more than 2^31 elements."""

    def refusal(height, width, channels, size=7, head_dim=64):
        problem = tiles.Problem(channels // head_dim, head_dim, height, width, size)
        tile = tiles.tile_of("key", problem, torch.bfloat16)
        constant = tiles.constants("key", tile, problem, torch.bfloat16)
        pixel = 3 * channels
        return tiles.exceeded(constant, problem, (height * width * pixel, width * pixel, pixel))

    assert 3 * 512 * 1183**2 > 2**31 and refusal(1183, 1183, 512) is None
    assert refusal(20, 100_000, 512) is None
    assert "10 rows of a map span" in refusal(20, 160_000, 512)
    assert refusal(tiles.MAX_GRID * 4, 1, 64) is None
    assert "it takes up to 262140" in refusal(tiles.MAX_GRID * 4 + 1, 1, 64)


def test_heads_of_a_program():
    """As many as divide the heads and leave enough programs."""
    found = [tiles.heads_per_program(heads, of_tiles) for heads, of_tiles in ((8, 4096), (8, 1024), (8, 1), (6, 9999))]
    assert found == [8, 2, 1, 2]


# ---- GPU -----------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("c", CASES, ids=str)
def test_on_the_gpu_it_matches_the_reference(c, dtype):
    check(triton_cases.errors(c, DTYPES[dtype], "cuda"), DTYPES[dtype])


@pytest.mark.gpu
@needs_triton
def test_on_the_gpu_a_program_serves_several_heads_in_turn():
    check(
        triton_cases.errors_with({"ENOUGH": 1}, case(8, 16, 7, 9, 17, batch=2), torch.bfloat16, "cuda"), torch.bfloat16
    )


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("layout", triton_cases.LAYOUTS)
def test_on_the_gpu_any_strides(layout):
    assert max(triton_cases.errors_of_layout(case(2, 8, 3, 3, 5, batch=2), layout, "cuda").values()) < 1e-5
