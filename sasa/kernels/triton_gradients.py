"""The device side of backend "triton", backward: the gradients' kernels. See triton_kernels.py, also for the shapes."""

import triton
import triton.language as tl

from sasa.kernels.triton_parts import (
    COLUMNS,
    FLOOR,
    LOG2E,
    SIZES,
    add_up,
    all_finite,
    collect,
    embedding_table,
    hold,
    hold_lost_keys,
    is_finite,
    load_keys,
    load_patch,
    lost_pixels,
    offset_of,
    origin,
    pair_logits,
    product,
    spread,
    takes_part,
)


@triton.jit
def _query_chunk(
    q, g, mean, norm, factor, by_offset, by_col, key, value, grad_q, by_slot, sum_col,
    shift_row, top, left, chunk, H, W, map_h, map_w,
    K: tl.constexpr, WINDOW: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, PW: tl.constexpr,
    MASK: tl.constexpr, CONTENT: tl.constexpr, RELATIVE: tl.constexpr, SUMS: tl.constexpr,
    REPAIR: tl.constexpr,
):  # fmt: skip
    """Adds a chunk of keys to grad_q [M, DP] and to the sums of the logits' gradients.

    Those by offset of the row in by_slot [M, 2 * WINDOW], those by column of the patch in sum_col [M, COLS]. SUMS: by
    products with one-hot matrices instead of additions across threads.
    """
    k, v, logits = load_keys(q, by_offset, by_col, key, value, shift_row, top, left, chunk, H, W, map_h, map_w,
                             K, WINDOW, D, DP, ROWS, PW, MASK, CONTENT, RELATIVE, REPAIR)  # fmt: skip
    M: tl.constexpr = logits.shape[0]
    P: tl.constexpr = ROWS * PW
    weights = tl.exp2(logits * factor - norm[:, None])
    grad = weights * product(g, tl.trans(v), tl.broadcast_to(-mean[:, None], M, P))  # of the scaled logits
    low = grad.to(k.dtype)
    if CONTENT:
        grad_q = product(low, k, grad_q)
    if RELATIVE:
        slot = tl.arange(0, 2 * WINDOW)[None, :]
        if SUMS:
            near = tl.arange(0, P)[:, None]
            of_row = (near // PW == tl.arange(0, 16)[None, :]).to(k.dtype)  # ROWS of its 16 columns are used
            by_row = tl.dot(low, of_row, input_precision="ieee")
            of_col = (near % PW == tl.arange(0, sum_col.shape[1])[None, :]).to(k.dtype)
            sum_col = product(low, of_col, sum_col)
        else:
            by_place = grad.reshape(M, ROWS, PW)
            by_row = tl.sum(by_place, 2)
            sum_col += tl.sum(by_place, 1)
        by_slot += collect(by_row, slot - shift_row - chunk * ROWS, slot < K, ROWS)
    return grad_q, by_slot, sum_col


@triton.jit
def _query_tiles(
    grad_out, query, key, value, rel_row, rel_col, out, lse, delta, grad_query, partial,
    grad_b, grad_h, grad_w, map_b, map_h, map_w, out_b, out_h, out_w, into_b, into_h, into_w,
    first, H, W, strips, scale, begin, end,
    N: tl.constexpr, K: tl.constexpr, WINDOW: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    TH: tl.constexpr, TW: tl.constexpr, ROWS: tl.constexpr, PW: tl.constexpr, CHUNKS: tl.constexpr,
    MASK: tl.constexpr, CONTENT: tl.constexpr, RELATIVE: tl.constexpr, FUSED: tl.constexpr,
    STRIP: tl.constexpr, SUMS: tl.constexpr, COLS: tl.constexpr, UNROLL: tl.constexpr,
    CONFINE: tl.constexpr, REPAIR: tl.constexpr,
):  # fmt: skip
    """Tiles `begin` to `end` of the column: gradient of the query, delta and the embeddings' gradient.

    Returns the sums of the query's gradient [M, COLUMNS], see `add_up`. REPAIR: what lost keys made NaN of it is
    written again, for the windows that hold none; delta and the embeddings' gradient stay.
    """
    head, tile_col = tl.program_id(0) % N, tl.program_id(0) // N
    strip = tl.program_id(1)
    batch = (tl.program_id(2) + first).to(tl.int64)
    col = tile_col * TW
    left = origin(col - (K - 1) // 2, MASK)

    pixel, channel = tl.arange(0, TH * TW), tl.arange(0, DP)[None, :]
    tile_cols = col + pixel % TW < W
    place = tl.arange(0, PW)[None, :]
    shift_col = (left - col + (K - 1) // 2 - pixel % TW)[:, None]
    counted = takes_part(left, place, W, MASK)
    slot = tl.arange(0, 2 * WINDOW)[None, :]

    query += batch * map_b + head * D
    if FUSED:
        key = query + N * D
        value = query + N * D * (1 + CONTENT)
    else:
        value += batch * map_b + head * D
        if CONTENT:
            key += batch * map_b + head * D
    grad_out += batch * grad_b + head * D
    out += batch * out_b + head * D
    grad_query += batch * into_b + head * D
    lse += (batch * N + head) * H * W
    delta += (batch * N + head) * H * W
    factor = scale * LOG2E
    if RELATIVE:
        table = embedding_table(rel_row + head * (D // 2) * K, rel_col + head * (D // 2) * K, K, WINDOW, D, DP)
        grad_table = tl.zeros([DP, 2 * WINDOW], tl.float32)

    seen = tl.zeros([TH * TW, COLUMNS], tl.float32)
    for tile_row in tl.range(begin, end):
        row = tile_row * TH
        top = origin(row - (K - 1) // 2, MASK)
        shift_row = (top - row + (K - 1) // 2 - pixel // TW)[:, None]
        inside = (row + pixel // TW < H) & tile_cols  # [M]
        own = inside[:, None] & (channel < D)
        q = tl.load(query + offset_of(row, col, map_h, map_w)
                    + (pixel // TW * map_h + pixel % TW * map_w)[:, None] + channel, mask=own, other=0.0)  # fmt: skip
        g = tl.load(grad_out + offset_of(row, col, grad_h, grad_w)
                    + (pixel // TW * grad_h + pixel % TW * grad_w)[:, None] + channel, mask=own, other=0.0)  # fmt: skip
        o = tl.load(out + offset_of(row, col, out_h, out_w)
                    + (pixel // TW * out_h + pixel % TW * out_w)[:, None] + channel, mask=own, other=0.0)  # fmt: skip
        mean = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)  # delta: sum of P dP over the window
        scalars = offset_of(row, col, W, 1) + pixel // TW * W + pixel % TW
        if not REPAIR:
            tl.store(delta + scalars, mean, mask=inside)
        norm = tl.load(lse + scalars, mask=inside, other=0.0) * LOG2E

        by_offset = q
        if RELATIVE:
            by_offset = tl.dot(q, table, input_precision="ieee")  # [M, 2 * WINDOW]
        by_col = spread(by_offset, shift_col + place, counted, WINDOW, K, WINDOW, RELATIVE)  # [M, PW]
        patch = offset_of(top, left, map_h, map_w)
        keys = value
        if CONTENT:
            keys = key + patch
        grad_q = tl.zeros([TH * TW, DP], tl.float32)
        by_slot = tl.zeros([TH * TW, 2 * WINDOW], tl.float32)
        sum_col = tl.zeros([TH * TW, COLS], tl.float32)
        if UNROLL:
            for chunk in tl.static_range(CHUNKS):
                grad_q, by_slot, sum_col = _query_chunk(
                    q, g, mean, norm, factor, by_offset, by_col, keys, value + patch, grad_q, by_slot, sum_col,
                    shift_row, top, left, chunk, H, W, map_h, map_w,
                    K, WINDOW, D, DP, ROWS, PW, MASK, CONTENT, RELATIVE, SUMS, REPAIR,
                )  # fmt: skip
        else:
            for chunk in tl.range(CHUNKS):
                grad_q, by_slot, sum_col = _query_chunk(
                    q, g, mean, norm, factor, by_offset, by_col, keys, value + patch, grad_q, by_slot, sum_col,
                    shift_row, top, left, chunk, H, W, map_h, map_w,
                    K, WINDOW, D, DP, ROWS, PW, MASK, CONTENT, RELATIVE, SUMS, REPAIR,
                )  # fmt: skip
        if RELATIVE:
            of_col = (slot >= WINDOW) & (slot < WINDOW + K)
            by_slot += collect(sum_col, slot - WINDOW - shift_col, of_col, PW)
            low = by_slot.to(q.dtype)
            grad_q = product(low, tl.trans(table), grad_q)
            if not REPAIR:
                grad_table = product(tl.trans(q), low, grad_table)
        into = grad_query + offset_of(row, col, into_h, into_w)
        into_at = (pixel // TW * into_h + pixel % TW * into_w)[:, None] + channel
        grad_q = (grad_q * scale).to(grad_query.dtype.element_ty)
        if CONFINE:
            seen = add_up(grad_q, seen)
        if REPAIR:
            own &= (hold_lost_keys(keys, value + patch, shift_row, shift_col + place, counted, top, left, H, W,
                                   map_h, map_w, K, D, DP, ROWS * CHUNKS, PW, MASK, CONTENT) == 0)[:, None]  # fmt: skip
        tl.store(into + into_at, grad_q, mask=own)

    if RELATIVE and not REPAIR:  # rows' offsets count in the first half of the channels, columns' in the second
        half: tl.constexpr = D // 2
        channel = tl.arange(0, DP)[:, None]
        offset = tl.where(channel < half, slot, slot - WINDOW)
        tiles_w = tl.num_programs(0) // N
        partial += (((batch * strips + strip) * tiles_w + tile_col) * N + head) * D * K
        tl.store(partial + channel * K + offset, grad_table * scale,
                 mask=(channel < D) & (offset >= 0) & (offset < K))  # fmt: skip
    return seen


@triton.jit(noinline=True)
def _repair_query(
    grad_out, query, key, value, rel_row, rel_col, out, lse, delta, grad_query, partial,
    grad_b, grad_h, grad_w, map_b, map_h, map_w, out_b, out_h, out_w, into_b, into_h, into_w,
    first, H, W, tiles_h, strips, scale,
    N: tl.constexpr, K: tl.constexpr, WINDOW: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    TH: tl.constexpr, TW: tl.constexpr, ROWS: tl.constexpr, PW: tl.constexpr, CHUNKS: tl.constexpr,
    MASK: tl.constexpr, CONTENT: tl.constexpr, RELATIVE: tl.constexpr, FUSED: tl.constexpr,
    STRIP: tl.constexpr, SUMS: tl.constexpr, COLS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    begin = tl.program_id(1) * STRIP
    end = tl.minimum(begin + STRIP, tiles_h)
    for tile in tl.range(begin, end):
        _query_tiles(
            grad_out, query, key, value, rel_row, rel_col, out, lse, delta, grad_query, partial,
            grad_b, grad_h, grad_w, map_b, map_h, map_w, out_b, out_h, out_w, into_b, into_h, into_w,
            first, H, W, strips, scale, tile, tile + 1,
            N, K, WINDOW, D, DP, TH, TW, ROWS, PW, CHUNKS, MASK, CONTENT, RELATIVE, FUSED,
            STRIP, SUMS, COLS, UNROLL, False, True,
        )  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def query_kernel(
    grad_out, query, key, value, rel_row, rel_col, out, lse, delta, grad_query, partial,
    grad_b, grad_h, grad_w, map_b, map_h, map_w, out_b, out_h, out_w, into_b, into_h, into_w,
    first, H, W, tiles_h, strips, scale,
    N: tl.constexpr, K: tl.constexpr, WINDOW: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    TH: tl.constexpr, TW: tl.constexpr, ROWS: tl.constexpr, PW: tl.constexpr, CHUNKS: tl.constexpr,
    MASK: tl.constexpr, CONTENT: tl.constexpr, RELATIVE: tl.constexpr, FUSED: tl.constexpr,
    STRIP: tl.constexpr, SUMS: tl.constexpr, COLS: tl.constexpr, UNROLL: tl.constexpr, CONFINE: tl.constexpr,
):  # fmt: skip
    begin = tl.program_id(1) * STRIP
    end = tl.minimum(begin + STRIP, tiles_h)
    seen = _query_tiles(
        grad_out, query, key, value, rel_row, rel_col, out, lse, delta, grad_query, partial,
        grad_b, grad_h, grad_w, map_b, map_h, map_w, out_b, out_h, out_w, into_b, into_h, into_w,
        first, H, W, strips, scale, begin, end,
        N, K, WINDOW, D, DP, TH, TW, ROWS, PW, CHUNKS, MASK, CONTENT, RELATIVE, FUSED,
        STRIP, SUMS, COLS, UNROLL, CONFINE, False,
    )  # fmt: skip
    if CONFINE and not all_finite(seen):
        _repair_query(
            grad_out, query, key, value, rel_row, rel_col, out, lse, delta, grad_query, partial,
            grad_b, grad_h, grad_w, map_b, map_h, map_w, out_b, out_h, out_w, into_b, into_h, into_w,
            first, H, W, tiles_h, strips, scale, N, K, WINDOW, D, DP, TH, TW, ROWS, PW, CHUNKS,
            MASK, CONTENT, RELATIVE, FUSED, STRIP, SUMS, COLS, UNROLL,
        )  # fmt: skip


@triton.jit
def _key_chunk(
    query, grad_out, lse, delta, k, v, table, factor, grad_k, grad_v, key_row, key_col, top, left, chunk, H, W,
    map_h, map_w, grad_h, grad_w,
    K: tl.constexpr, WINDOW: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr,
    ROWS: tl.constexpr, PW: tl.constexpr, CONTENT: tl.constexpr, RELATIVE: tl.constexpr, REPAIR: tl.constexpr,
):  # fmt: skip
    """Adds a chunk of queries to grad_k, grad_v [M, DP]. key_row, key_col: offset of the tile's first key, [P, 1].

    The queries are the rows of all products, as in the other kernels: turned round, it cost half more.
    """
    near = tl.arange(0, ROWS * PW)
    near_row, near_col = chunk * ROWS + near // PW, near % PW
    q = load_patch(query, top, left, near_row, near_col, H, W, map_h, map_w, True, D, DP, REPAIR)
    g = load_patch(grad_out, top, left, near_row, near_col, H, W, grad_h, grad_w, True, D, DP, REPAIR)
    inside = (top + near_row < H) & (left + near_col < W)
    scalar = near_row * W + near_col
    norm = tl.load(lse + scalar, mask=inside, other=-FLOOR) * LOG2E  # a query outside the map gets weights of 0
    if REPAIR:
        norm = tl.where(is_finite(norm), norm, -FLOOR * LOG2E)
    by_offset = q
    if RELATIVE:
        by_offset = tl.dot(q, table, input_precision="ieee")  # [P, 2 * WINDOW]
    place_row, place_col = tl.arange(0, TH)[None, :], tl.arange(0, TW)[None, :]
    row = spread(by_offset, key_row - chunk * ROWS + place_row, place_row >= 0, 0, K, WINDOW, RELATIVE)  # [P, TH]
    col = spread(by_offset, key_col + place_col, place_col >= 0, WINDOW, K, WINDOW, RELATIVE)  # [P, TW]
    weights = tl.exp2(pair_logits(q, k, row, col, CONTENT) * factor - norm[:, None])  # [P, M]
    grad_v = product(tl.trans(weights.to(g.dtype)), g, grad_v)
    if CONTENT:
        mean = tl.load(delta + scalar, mask=inside, other=0.0)
        if REPAIR:
            mean = tl.where(is_finite(mean), mean, 0.0)
        grad = weights * product(g, tl.trans(v), tl.broadcast_to(-mean[:, None], ROWS * PW, TH * TW))
        grad_k = product(tl.trans(grad.to(q.dtype)), q, grad_k)
    return grad_k, grad_v


@triton.jit
def _hold_lost_queries(
    query, grad_out, lse, delta, shift_row, shift_col, top, left, H, W, map_h, map_w, grad_h, grad_w,
    K: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr,
    HEIGHT: tl.constexpr, PW: tl.constexpr, CONTENT: tl.constexpr,
):  # fmt: skip
    """Which keys are in the window of a query that makes the gradient of the key, and of the value, NaN or infinite.

    0 or 1, [M] each. A query with its gradient and log-sum-exp makes both so, its delta that of the key alone.
    """
    pixel, near_col = tl.arange(0, TH * TW), tl.arange(0, PW)
    offset_col = (shift_col + (K - 1) // 2 + pixel % TW)[:, None] - near_col[None, :]
    in_cols = (offset_col >= 0) & (offset_col < K)  # [M, PW]
    of_key, of_value = tl.zeros([TH * TW], tl.int32), tl.zeros([TH * TW], tl.int32)
    for near_row in tl.range(HEIGHT):
        row = near_row + 0 * near_col
        offset_row = (shift_row + (K - 1) // 2 + pixel // TW)[:, None] - near_row
        in_row = (offset_row >= 0) & (offset_row < K)  # [M, 1]
        inside = (top + row < H) & (left + near_col < W)
        scalar = row * W + near_col
        lost = lost_pixels(load_patch(query, top, left, row, near_col, H, W, map_h, map_w, True, D, DP, False))  # [PW]
        lost |= lost_pixels(load_patch(grad_out, top, left, row, near_col, H, W, grad_h, grad_w, True, D, DP, False))
        lost |= 1 - is_finite(tl.load(lse + scalar, mask=inside, other=0.0)).to(tl.int32)
        of_value |= hold(in_row, in_cols & inside[None, :], lost)
        if CONTENT:
            lost |= 1 - is_finite(tl.load(delta + scalar, mask=inside, other=0.0)).to(tl.int32)
        of_key |= hold(in_row, in_cols & inside[None, :], lost)
    return of_key, of_value


@triton.jit
def _key_tile(
    grad_out, query, key, value, rel_row, rel_col, lse, delta, grad_key, grad_value,
    grad_b, grad_h, grad_w, map_b, map_h, map_w, into_b, into_h, into_w, first, H, W, scale, turn,
    N: tl.constexpr, HEADS: tl.constexpr, K: tl.constexpr, WINDOW: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    TH: tl.constexpr, TW: tl.constexpr, ROWS: tl.constexpr, PW: tl.constexpr, CHUNKS: tl.constexpr,
    CONTENT: tl.constexpr, RELATIVE: tl.constexpr, FUSED: tl.constexpr, UNROLL: tl.constexpr,
    CONFINE: tl.constexpr, REPAIR: tl.constexpr, TURNS: tl.constexpr,
):  # fmt: skip
    """A tile of keys, TURNS heads of the program from `turn` on: gradients of key and value.

    Returns the sums of the key's gradient, without keys of the value's [M, COLUMNS], see `add_up`. REPAIR: what lost
    queries made NaN is written again, for the keys that are in the window of none.
    """
    GROUPS: tl.constexpr = N // HEADS
    head = tl.program_id(0) % GROUPS * HEADS + turn
    row, col = tl.program_id(1) * TH, tl.program_id(0) // GROUPS * TW  # of the tile of keys
    batch = (tl.program_id(2) + first).to(tl.int64)
    # A key at h is in the windows of the queries from h - K // 2 to h + (K - 1) // 2.
    top, left = origin(row - K // 2, True), origin(col - K // 2, True)

    pixel, near, channel = tl.arange(0, TH * TW), tl.arange(0, ROWS * PW), tl.arange(0, DP)[None, :]
    own = ((row + pixel // TW < H) & (col + pixel % TW < W))[:, None] & (channel < D)
    tile_at = (pixel // TW * map_h + pixel % TW * map_w)[:, None] + channel
    into_at = (pixel // TW * into_h + pixel % TW * into_w)[:, None] + channel
    key_row = (row - top + (K - 1) // 2 - near // PW)[:, None]
    key_col = (col - left + (K - 1) // 2 - near % PW)[:, None]

    query += batch * map_b + head * D
    tile = offset_of(row, col, map_h, map_w)
    if FUSED:
        key = query + N * D + tile
        value = query + N * D * (1 + CONTENT) + tile
    else:
        value += batch * map_b + head * D + tile
        if CONTENT:
            key += batch * map_b + head * D + tile
    query += offset_of(top, left, map_h, map_w)
    grad_out += batch * grad_b + head * D + offset_of(top, left, grad_h, grad_w)
    into = batch * into_b + head * D + offset_of(row, col, into_h, into_w)
    if CONTENT:
        grad_key += into
    if FUSED and CONTENT:
        grad_value = grad_key + N * D
    else:
        grad_value += into
    scalars = (batch * N + head) * H * W + offset_of(top, left, W, 1)
    lse += scalars
    delta += scalars
    if RELATIVE:
        rel_row += head * (D // 2) * K
        rel_col += head * (D // 2) * K
    factor = scale * LOG2E
    seen = tl.zeros([TH * TW, COLUMNS], tl.float32)
    for _head in tl.range(TURNS):
        v = tl.load(value + tile_at, mask=own, other=0.0)  # [M, DP]
        k = v
        if CONTENT:
            k = tl.load(key + tile_at, mask=own, other=0.0)
        table = v
        if RELATIVE:
            table = embedding_table(rel_row, rel_col, K, WINDOW, D, DP)
        grad_k = tl.zeros([TH * TW, DP], tl.float32)
        grad_v = tl.zeros([TH * TW, DP], tl.float32)
        if UNROLL:
            for chunk in tl.static_range(CHUNKS):
                grad_k, grad_v = _key_chunk(
                    query, grad_out, lse, delta, k, v, table, factor, grad_k, grad_v, key_row, key_col, top, left,
                    chunk, H, W, map_h, map_w, grad_h, grad_w,
                    K, WINDOW, D, DP, TH, TW, ROWS, PW, CONTENT, RELATIVE, REPAIR,
                )  # fmt: skip
        else:
            for chunk in tl.range(CHUNKS):
                grad_k, grad_v = _key_chunk(
                    query, grad_out, lse, delta, k, v, table, factor, grad_k, grad_v, key_row, key_col, top, left,
                    chunk, H, W, map_h, map_w, grad_h, grad_w,
                    K, WINDOW, D, DP, TH, TW, ROWS, PW, CONTENT, RELATIVE, REPAIR,
                )  # fmt: skip
        grad_v = grad_v.to(grad_value.dtype.element_ty)
        stored_k = own
        stored_v = own
        if REPAIR:
            of_key, of_value = _hold_lost_queries(query, grad_out, lse, delta, row - top, col - left, top, left, H, W,
                                                  map_h, map_w, grad_h, grad_w,
                                                  K, D, DP, TH, TW, ROWS * CHUNKS, PW, CONTENT)  # fmt: skip
            stored_k &= (of_key == 0)[:, None]
            stored_v &= (of_value == 0)[:, None]
        tl.store(grad_value + into_at, grad_v, mask=stored_v)
        if CONTENT:
            grad_k = (grad_k * scale).to(grad_key.dtype.element_ty)
            tl.store(grad_key + into_at, grad_k, mask=stored_k)
            if CONFINE:  # where the value's gradient is not finite, neither is this
                seen = add_up(grad_k, seen)
            key += D
            grad_key += D
        elif CONFINE:
            seen = add_up(grad_v, seen)
        query += D
        value += D
        grad_out += D
        grad_value += D
        lse += H.to(tl.int64) * W
        delta += H.to(tl.int64) * W
        if RELATIVE:
            rel_row += D // 2 * K
            rel_col += D // 2 * K
    return seen


@triton.jit(noinline=True)
def _repair_key(
    grad_out, query, key, value, rel_row, rel_col, lse, delta, grad_key, grad_value,
    grad_b, grad_h, grad_w, map_b, map_h, map_w, into_b, into_h, into_w, first, H, W, scale,
    N: tl.constexpr, HEADS: tl.constexpr, K: tl.constexpr, WINDOW: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    TH: tl.constexpr, TW: tl.constexpr, ROWS: tl.constexpr, PW: tl.constexpr, CHUNKS: tl.constexpr,
    CONTENT: tl.constexpr, RELATIVE: tl.constexpr, FUSED: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    for turn in tl.range(HEADS):
        _key_tile(
            grad_out, query, key, value, rel_row, rel_col, lse, delta, grad_key, grad_value,
            grad_b, grad_h, grad_w, map_b, map_h, map_w, into_b, into_h, into_w, first, H, W, scale, turn,
            N, HEADS, K, WINDOW, D, DP, TH, TW, ROWS, PW, CHUNKS, CONTENT, RELATIVE, FUSED, UNROLL, False, True, 1,
        )  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def key_kernel(
    grad_out, query, key, value, rel_row, rel_col, lse, delta, grad_key, grad_value,
    grad_b, grad_h, grad_w, map_b, map_h, map_w, into_b, into_h, into_w, first, H, W, scale,
    N: tl.constexpr, HEADS: tl.constexpr, K: tl.constexpr, WINDOW: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    TH: tl.constexpr, TW: tl.constexpr, ROWS: tl.constexpr, PW: tl.constexpr, CHUNKS: tl.constexpr,
    CONTENT: tl.constexpr, RELATIVE: tl.constexpr, FUSED: tl.constexpr, UNROLL: tl.constexpr, CONFINE: tl.constexpr,
):  # fmt: skip
    seen = _key_tile(
        grad_out, query, key, value, rel_row, rel_col, lse, delta, grad_key, grad_value,
        grad_b, grad_h, grad_w, map_b, map_h, map_w, into_b, into_h, into_w, first, H, W, scale, 0,
        N, HEADS, K, WINDOW, D, DP, TH, TW, ROWS, PW, CHUNKS, CONTENT, RELATIVE, FUSED, UNROLL, CONFINE, False, HEADS,
    )  # fmt: skip
    if CONFINE and not all_finite(seen):
        _repair_key(
            grad_out, query, key, value, rel_row, rel_col, lse, delta, grad_key, grad_value,
            grad_b, grad_h, grad_w, map_b, map_h, map_w, into_b, into_h, into_w, first, H, W, scale,
            N, HEADS, K, WINDOW, D, DP, TH, TW, ROWS, PW, CHUNKS, CONTENT, RELATIVE, FUSED, UNROLL,
        )  # fmt: skip
