"""The device side of backend "triton": fused local attention, forward.

A program serves one tile of TH x TW pixels. All windows of the tile lie in one patch, the tile with its halo, so the
logits of the tile are one product (pixels of the tile) x (pixels of the patch), taken in CHUNKS of ROWS x PW patch
pixels. Relative logits, window and border are separable: one product with both embeddings gives a number per offset in
the window and pixel, which a gather spreads over the rows and over the columns of the patch; a pair that a row or a
column excludes gets MASKED there, and nothing is compared on the whole tile x patch. That sum starts the accumulator of
the product q.k, as -delta starts that of the logits' gradient.

    forward_kernel   a tile of queries, its patch of keys, HEADS heads in turn: out and log-sum-exp
    query_kernel     a tile of queries after the other of a vertical strip: gradient of the query, delta for the next
                     kernel, the embeddings' gradient summed over the strip (triton_gradients.py)
    key_kernel       a tile of keys, the patch of queries that see it, HEADS heads in turn: gradients of key and value
                     (there too)

CONFINE: a lost pixel, one that holds NaN or infinity, makes NaN of all windows of the tile, as 0 * NaN is NaN in the
products. Such a program adds up its results, looks at the sum once, at its end, and where that is not finite calls its
`_repair`, which computes again with zeros for lost pixels and stores only the windows that hold none: with the bits of
a run without them. It is a function of its own, not inlined: else what always runs keeps values for it in registers.

No atomics: each number has one program that writes it. The grid is (heads and columns of tiles, rows of tiles or
strips, batch), the heads fastest, so neighbouring programs read neighbouring memory. A tile's address is computed in 64
bits, the offsets inside a patch in 32.

Shapes: B batch, N heads, D head width, DP D padded to a power of 2 of at least 16, H x W map, K window side, WINDOW K
padded to 8 or 16; in brackets those of tiles: M = TH * TW pixels of a tile, P = ROWS * PW pixels of a chunk. Channels
have stride 1 and heads stride D; strides of B, H and W are arguments, and query, key and value share theirs. FUSED: key
and value follow query in the same pixel of a fused projection, so that one address serves the three.
"""

import triton
import triton.language as tl

from sasa.kernels.triton_parts import (
    COLUMNS,
    FLOOR,
    LN2,
    LOG2E,
    SIZES,
    add_up,
    all_finite,
    embedding_table,
    hold_lost_keys,
    load_keys,
    offset_of,
    origin,
    product,
    spread,
    takes_part,
)


@triton.jit
def _forward_tile(
    query, key, value, rel_row, rel_col, out, lse, map_b, map_h, map_w, out_b, out_h, out_w,
    first, H, W, scale, turn,
    N: tl.constexpr, HEADS: tl.constexpr, K: tl.constexpr, WINDOW: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    TH: tl.constexpr, TW: tl.constexpr, ROWS: tl.constexpr, PW: tl.constexpr, CHUNKS: tl.constexpr,
    MASK: tl.constexpr, CONTENT: tl.constexpr, RELATIVE: tl.constexpr, FUSED: tl.constexpr, CONFINE: tl.constexpr,
    REPAIR: tl.constexpr, TURNS: tl.constexpr,
):  # fmt: skip
    """TURNS heads of the program from `turn` on, softmax at once where the patch is one chunk, else online over them.

    Returns the sums of the output [M, COLUMNS], see `add_up`. REPAIR: what lost keys made NaN is written again, for the
    windows that hold none.
    """
    GROUPS: tl.constexpr = N // HEADS
    head = tl.program_id(0) % GROUPS * HEADS + turn
    row, col = tl.program_id(1) * TH, tl.program_id(0) // GROUPS * TW  # of the tile
    batch = (tl.program_id(2) + first).to(tl.int64)
    top, left = origin(row - (K - 1) // 2, MASK), origin(col - (K - 1) // 2, MASK)  # of the patch

    pixel, channel = tl.arange(0, TH * TW), tl.arange(0, DP)[None, :]
    inside = (row + pixel // TW < H) & (col + pixel % TW < W)  # [M]
    own = inside[:, None] & (channel < D)
    tile_at = (pixel // TW * map_h + pixel % TW * map_w)[:, None] + channel
    out_at = (pixel // TW * out_h + pixel % TW * out_w)[:, None] + channel
    place = tl.arange(0, PW)[None, :]
    shift_row = (top - row + (K - 1) // 2 - pixel // TW)[:, None]
    offset_col = (left - col + (K - 1) // 2 - pixel % TW)[:, None] + place  # [M, PW]
    counted = takes_part(left, place, W, MASK)

    query += batch * map_b + head * D
    patch = offset_of(top, left, map_h, map_w)
    if FUSED:
        key = query + N * D + patch
        value = query + N * D * (1 + CONTENT) + patch
    else:
        value += batch * map_b + head * D + patch
        if CONTENT:
            key += batch * map_b + head * D + patch
    query += offset_of(row, col, map_h, map_w)
    out += batch * out_b + head * D + offset_of(row, col, out_h, out_w)
    lse += (batch * N + head) * H * W + offset_of(row, col, W, 1)
    if RELATIVE:
        rel_row += head * (D // 2) * K
        rel_col += head * (D // 2) * K
    factor = scale * LOG2E
    seen = tl.zeros([TH * TW, COLUMNS], tl.float32)
    for _head in tl.range(TURNS):
        q = tl.load(query + tile_at, mask=own, other=0.0)  # [M, DP]
        by_offset = q  # nothing where there are no embeddings
        if RELATIVE:
            table = embedding_table(rel_row, rel_col, K, WINDOW, D, DP)
            by_offset = tl.dot(q, table, input_precision="ieee")  # [M, 2 * WINDOW]
        by_col = spread(by_offset, offset_col, counted, WINDOW, K, WINDOW, RELATIVE)  # [M, PW]
        if CHUNKS == 1:
            _k, v, logits = load_keys(q, by_offset, by_col, key, value, shift_row, top, left, 0, H, W, map_h, map_w,
                                      K, WINDOW, D, DP, ROWS, PW, MASK, CONTENT, RELATIVE, REPAIR)  # fmt: skip
            maximum = tl.maximum(tl.max(logits, 1), FLOOR)
            weights = tl.exp2(logits * factor - (maximum * factor)[:, None])
            total = tl.sum(weights, 1)
            mixed = tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        else:
            maximum = tl.full([TH * TW], FLOOR, tl.float32)
            total = tl.zeros([TH * TW], tl.float32)
            mixed = tl.zeros([TH * TW, DP], tl.float32)
            for chunk in tl.range(CHUNKS):
                _k, v, logits = load_keys(q, by_offset, by_col, key, value, shift_row, top, left, chunk, H, W,
                                          map_h, map_w, K, WINDOW, D, DP, ROWS, PW, MASK, CONTENT, RELATIVE,
                                          REPAIR)  # fmt: skip
                highest = tl.maximum(maximum, tl.max(logits, 1))
                weights = tl.exp2(logits * factor - (highest * factor)[:, None])
                fade = tl.exp2((maximum - highest) * factor)
                total = total * fade + tl.sum(weights, 1)
                mixed = product(weights.to(v.dtype), v, mixed * fade[:, None])
                maximum = highest
        total = tl.maximum(total, 1e-30, propagate_nan=tl.PropagateNan.ALL)  # 0 for pixels of a ragged tile: not stored
        mixed = (mixed * (1.0 / total)[:, None]).to(out.dtype.element_ty)
        if CONFINE:
            seen = add_up(mixed, seen)
        stored = inside
        if REPAIR:
            stored &= hold_lost_keys(key, value, shift_row, offset_col, counted, top, left, H, W, map_h, map_w,
                                     K, D, DP, ROWS * CHUNKS, PW, MASK, CONTENT) == 0  # fmt: skip
        tl.store(out + out_at, mixed, mask=stored[:, None] & (channel < D))
        tl.store(lse + pixel // TW * W + pixel % TW, maximum * scale + tl.log2(total) * LN2, mask=stored)
        query += D
        value += D
        out += D
        lse += H.to(tl.int64) * W
        if CONTENT:
            key += D
        if RELATIVE:
            rel_row += D // 2 * K
            rel_col += D // 2 * K
    return seen


@triton.jit(noinline=True)
def _repair_forward(
    query, key, value, rel_row, rel_col, out, lse, map_b, map_h, map_w, out_b, out_h, out_w, first, H, W, scale,
    N: tl.constexpr, HEADS: tl.constexpr, K: tl.constexpr, WINDOW: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    TH: tl.constexpr, TW: tl.constexpr, ROWS: tl.constexpr, PW: tl.constexpr, CHUNKS: tl.constexpr,
    MASK: tl.constexpr, CONTENT: tl.constexpr, RELATIVE: tl.constexpr, FUSED: tl.constexpr,
):  # fmt: skip
    for turn in tl.range(HEADS):
        _forward_tile(
            query, key, value, rel_row, rel_col, out, lse, map_b, map_h, map_w, out_b, out_h, out_w,
            first, H, W, scale, turn,
            N, HEADS, K, WINDOW, D, DP, TH, TW, ROWS, PW, CHUNKS,
            MASK, CONTENT, RELATIVE, FUSED, False, True, 1,
        )  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    query, key, value, rel_row, rel_col, out, lse, map_b, map_h, map_w, out_b, out_h, out_w, first, H, W, scale,
    N: tl.constexpr, HEADS: tl.constexpr, K: tl.constexpr, WINDOW: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    TH: tl.constexpr, TW: tl.constexpr, ROWS: tl.constexpr, PW: tl.constexpr, CHUNKS: tl.constexpr,
    MASK: tl.constexpr, CONTENT: tl.constexpr, RELATIVE: tl.constexpr, FUSED: tl.constexpr, CONFINE: tl.constexpr,
):  # fmt: skip
    seen = _forward_tile(
        query, key, value, rel_row, rel_col, out, lse, map_b, map_h, map_w, out_b, out_h, out_w,
        first, H, W, scale, 0,
        N, HEADS, K, WINDOW, D, DP, TH, TW, ROWS, PW, CHUNKS,
        MASK, CONTENT, RELATIVE, FUSED, CONFINE, False, HEADS,
    )  # fmt: skip
    if CONFINE and not all_finite(seen):
        _repair_forward(
            query, key, value, rel_row, rel_col, out, lse, map_b, map_h, map_w, out_b, out_h, out_w,
            first, H, W, scale,
            N, HEADS, K, WINDOW, D, DP, TH, TW, ROWS, PW, CHUNKS, MASK, CONTENT, RELATIVE, FUSED,
        )  # fmt: skip
