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
    "rows beyond the strip": ("tl.minimum(strip * STRIP + STRIP, tiles_h)", "tiles_h", case(1, 8, 3, 5, 2),
                              {"STRIP": 1}),
    "one head's log-sum-exp": ("        out += D\n        lse += H.to(tl.int64) * W\n", "        out += D\n",
                               TWO, HEADS),
    "one head's delta": ("        delta += H.to(tl.int64) * W\n", "", TWO, HEADS),
    "one head's embeddings": ("            rel_col += D // 2 * K\n", "", TWO, HEADS),
    "the first images again": ("tl.program_id(2) + first", "tl.program_id(2)", case(1, 8, 3, 2, 3, batch=3),
                               {"MAX_GRID": 2}),
}  # fmt: skip


@pytest.fixture(scope="module")
def right_cases():
    """Those that the kernels without a mistake were checked on."""
    return set()


@needs_triton
@pytest.mark.parametrize("which", MUTANTS)
def test_mutants_are_seen(which, interpreter, right_cases, tmp_path):
    """The same case without the mistake is right."""
    old, new, c, *settings = MUTANTS[which]
    settings = settings[0] if settings else {}
    source = (Path(cuda.__file__).parent / "triton_kernels.py").read_text()
    assert old in source
    if (c, *settings) not in right_cases:
        check(interpreter(triton_cases.errors_with, settings, c), torch.float32)
        right_cases.add((c, *settings))
    mutant = tmp_path / "mutant.py"
    mutant.write_text(source.replace(old, new))
    with pytest.raises(AssertionError, match="off by"):
        check(interpreter(triton_cases.errors_of_mutant, mutant, settings, c), torch.float32)
