"""Mistakes that are easily made in the kernels of backend "triton": each shows in a small case of its own.

The interpreter computes them (tests/triton_cases.py).
"""

from pathlib import Path

import pytest
import torch

import triton_cases
from sasa.kernels import triton_backend as cuda
from triton_cases import case, check, needs_triton

LARGE, WHOLE = case(1, 8, 3, 9, 4), case(1, 8, 7, 5, 5)  # higher than the patch, in one patch
TWO, HEADS = case(2, 8, 3, 3, 4), {"ENOUGH": 1}  # heads that one program serves in turn
# Name -> the right text, the wrong one, the case, settings of triton_tiles.py
MUTANTS = {
    "no patch clamp": ("first = tl.maximum(first, 0)", "first = first", WHOLE),
    "patch clamped to the first rows": (
        "first = tl.maximum(first, 0)", "first = tl.minimum(tl.maximum(first, 0), 1)", LARGE,
    ),
    "flipped offset": ("shift_row = (top - row +", "shift_row = (row - top +", LARGE),
    "flipped offset, key kernel": ("key_row = (row - top +", "key_row = (top - row +", LARGE),
    "window of an even K the other way": (
        "origin(row - (K - 1) // 2, MASK)", "origin(row - K // 2, MASK)", case(1, 8, 4, 6, 5, "zero"),
    ),
    "queries of an even K the other way": (
        "origin(row - K // 2, True)", "origin(row - (K - 1) // 2, True)", case(1, 8, 4, 6, 5),
    ),
    "no border mask, rows": ("takes_part(top, place, H, MASK)", "(place >= 0)", case(1, 8, 3, 5, 4)),
    "no border mask, columns": ("takes_part(left, place, W, MASK)", "(place >= 0)", case(1, 8, 3, 4, 5)),
    "border always masked": ("takes_part(top, place, H, MASK)", "(top + place < H)", case(1, 8, 3, 5, 6, "zero")),
    "keys outside a zero border": ("(top + row >= 0) &", "(top + row >= -9) &", case(1, 8, 3, 5, 6, "zero", batch=2)),
    "queries outside the map": ("mask=inside, other=-FLOOR", "mask=inside, other=0.0", case(1, 8, 3, 5, 4)),
    "swapped embeddings": ("tl.load(rel_row + channel", "tl.load(rel_col + channel", case(1, 8, 3, 5, 6)),
    "swapped halves of their gradient": ("tl.where(channel < half, slot,", "tl.where(channel >= half, slot,",
                                         case(1, 8, 3, 5, 6)),
    "no fade of the online softmax": ("total * fade", "total", case(1, 8, 9, 5, 6)),
    "no delta": ("tl.broadcast_to(-mean[:, None]", "tl.broadcast_to(0 * mean[:, None]", case(1, 8, 3, 5, 6)),
    "no scale": ("grad_k * scale", "grad_k", case(1, 8, 3, 5, 6, scale=0.25)),
    "rows beyond the strip": ("end = tl.minimum(begin + STRIP, tiles_h)", "end = tiles_h", case(1, 8, 3, 5, 2),
                              {"STRIP": 1}),
    "one head's log-sum-exp": ("        out += D\n        lse += H.to(tl.int64) * W\n", "        out += D\n",
                               TWO, HEADS),
    "one head's delta": ("        delta += H.to(tl.int64) * W\n", "", TWO, HEADS),
    "one head's embeddings": ("            rel_col += D // 2 * K\n", "", TWO, HEADS),
    "the first images again": ("tl.program_id(2) + first", "tl.program_id(2)", case(1, 8, 3, 2, 3, batch=3),
                               {"MAX_GRID": 2}),
}  # fmt: skip


# What keeps NaN in its windows: name -> the right text, the wrong one, the map that holds the number, the number,
# whether other numbers change by the mistake (else some are finite that are not by the definition), settings
NAN, INF = float("nan"), float("inf")
LOSSES = {
    "no look, forward": ("seen = add_up(mixed, seen)", "seen = seen", "key", NAN, True),
    "no look, query kernel": ("seen = add_up(grad_q, seen)", "seen = seen", "key", NAN, True),
    "no look, key kernel": ("seen = add_up(grad_k, seen)", "seen = seen", "query", NAN, True),
    "a look for NaN alone": ("tl.abs(x.to(tl.float32)) < INFINITY", "x == x", "key", INF, True),
    "lost pixels are not zeros": ("lost_pixels(x)[:, None] == 0", "lost_pixels(x)[:, None] >= 0", "value", NAN, True),
    "their log-sum-exp": ("norm = tl.where(is_finite(norm), norm, -FLOOR * LOG2E)", "norm = norm", "query", NAN, True),
    "their delta": ("mean = tl.where(is_finite(mean), mean, 0.0)", "mean = mean", "value", NAN, True),
    "windows that hold keys are written": ("hold((offset >= 0)", "hold((offset >= K)", "key", NAN, False),
    "windows that hold queries are written": (
        "in_cols = (offset_col >= 0)", "in_cols = (offset_col >= K)", "query", NAN, False,
    ),
    "windows of queries one to the right": (
        "(shift_col + (K - 1) // 2 + pixel % TW)", "(shift_col + K // 2 + 1 + pixel % TW)", "query", NAN, True,
    ),
    "the first head again": ("% GROUPS * HEADS + turn", "% GROUPS * HEADS", "key", NAN, True, HEADS),
}  # fmt: skip


@pytest.fixture(scope="module")
def right_cases():
    """Those that the kernels without a mistake were checked on."""
    return set()


def write_mutant(folder, old, new):
    """The device side with another text."""
    device = Path(cuda.__file__).parent
    sources = {file: (device / f"{file}.py").read_text() for file in triton_cases.DEVICE_FILES}
    assert any(old in source for source in sources.values())
    for file, source in sources.items():
        (folder / f"{file}.py").write_text(source.replace(old, new))


@needs_triton
@pytest.mark.parametrize("which", MUTANTS)
def test_mutants_are_seen(which, interpreter, right_cases, tmp_path):
    """The same case without the mistake is right."""
    old, new, c, *settings = MUTANTS[which]
    settings = settings[0] if settings else {}
    write_mutant(tmp_path, old, new)
    if (c, *settings) not in right_cases:
        check(interpreter(triton_cases.errors_with, settings, c), torch.float32)
        right_cases.add((c, *settings))
    with pytest.raises(AssertionError, match="off by"):
        check(interpreter(triton_cases.errors_of_mutant, tmp_path, settings, c), torch.float32)


@needs_triton
@pytest.mark.parametrize("which", LOSSES)
def test_mutants_that_lose_or_spread_nan_are_seen(which, interpreter, tmp_path):
    """test_triton_numbers.py holds the same cases without the mistake."""
    old, new, name, value, spreads, *settings = LOSSES[which]
    c = case(2, 8, 3, 2, 9) if settings else case(1, 8, 3, 3, 9)
    write_mutant(tmp_path, old, new)
    found = interpreter(triton_cases.lost_by_mutant, tmp_path, settings[0] if settings else {}, c, name, value, spreads)
    assert any(found.values()), found
