"""The device side of backend "triton": three kernels of fused local attention, and what they share.

A program serves one tile of TH x TW pixels. All windows of the tile lie in one patch, the tile with its halo, so the
logits of the tile are one product (pixels of the tile) x (pixels of the patch), taken in CHUNKS of ROWS x PW patch
pixels. Relative logits, window and border are separable: one product with both embeddings gives a number per offset in
the window and pixel, which a gather spreads over the rows and over the columns of the patch; a pair that a row or a
column excludes gets MASKED there, and nothing is compared on the whole tile x patch. That sum starts the accumulator of
the product q.k, as -delta starts that of the logits' gradient.

    forward_kernel   a tile of queries, its patch of keys, HEADS heads in turn: out and log-sum-exp
    query_kernel     a tile of queries after the other of a vertical strip: gradient of the query, delta for the next
                     kernel, the embeddings' gradient summed over the strip
    key_kernel       a tile of keys, the patch of queries that see it, HEADS heads in turn: gradients of key and value

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

MASKED = tl.constexpr(-1e30)  # not -inf: a pixel of a ragged tile may have no key at all, and inf - inf is NaN
FLOOR = tl.constexpr(-1e29)  # of the maximum: exp2(MASKED - FLOOR) is 0
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

SIZES = ["first", "H", "W", "tiles_h", "strips"]  # plain numbers: no variant for sizes of 1 or multiples of 16


@triton.jit
def _product(a, b, start):
    """a [I, J] x b [J, L] + start [I, L], in fp32. fp32 stays fp32: no TF32."""
    return tl.dot(a, b, start, input_precision="ieee")


@triton.jit
def _origin(first, CLAMP: tl.constexpr):
    """Where a patch starts. A clamped one need not be larger than the map, and begins on it."""
    if CLAMP:
        first = tl.maximum(first, 0)
    return first


@triton.jit
def _load_patch(base, top, left, row, col, H, W, stride_h, stride_w, CLAMP: tl.constexpr, D: tl.constexpr,
                DP: tl.constexpr):  # fmt: skip
    """Pixels row, col [P] of the patch at top, left, whose first pixel is at `base`: [P, DP].

    Outside the map they are 0, or with CLAMP any pixel of the map, which the caller leaves out: masked loads cost more.
    """
    channel = tl.arange(0, DP)[None, :]
    if CLAMP and DP % D == 0:  # channels beyond D count nowhere, so they may be those of the head once more
        row, col = tl.minimum(row, H - 1 - top), tl.minimum(col, W - 1 - left)
        x = tl.load(base + (row * stride_h + col * stride_w)[:, None] + channel % D)
    else:
        inside = (top + row >= 0) & (top + row < H) & (left + col >= 0) & (left + col < W)
        offset = (row * stride_h + col * stride_w)[:, None] + channel
        x = tl.load(base + offset, mask=inside[:, None] & (channel < D), other=0.0)
    return x


@triton.jit
def _counted(first, place, size, MASK: tl.constexpr):
    """Which of them take part in the softmax: those on the map, or all where the border is zero."""
    if MASK:
        counted = first + place < size
    else:
        counted = place >= 0
    return counted


@triton.jit
def _at(row, col, stride_h, stride_w):
    """The offset of the first pixel of a tile or patch, in 64 bits."""
    return row.to(tl.int64) * stride_h + col.to(tl.int64) * stride_w


@triton.jit
def _embedding_table(rel_row, rel_col, K: tl.constexpr, WINDOW: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    """A head's embeddings (D / 2, K) as one table [DP, 2 * WINDOW]: the row's channels and offsets first, else 0."""
    half: tl.constexpr = D // 2
    channel = tl.arange(0, DP)[:, None]
    offset = tl.arange(0, 2 * WINDOW)[None, :]
    of_row = tl.load(rel_row + channel * K + offset, mask=(channel < half) & (offset < K), other=0.0)
    col_mask = (channel >= half) & (channel < D) & (offset >= WINDOW) & (offset < WINDOW + K)
    of_col = tl.load(rel_col + (channel - half) * K + (offset - WINDOW), mask=col_mask, other=0.0)
    return of_row + of_col


@triton.jit
def _spread(by_offset, offset, counted, FIRST: tl.constexpr, K: tl.constexpr, WINDOW: tl.constexpr, REL: tl.constexpr):
    """Logits by offset in the window -> by row (or column) of the patch, MASKED outside the window and the map.

    by_offset [M, 2 * WINDOW], those of columns from FIRST on; offset [M, n] of each row; counted [1, n] -> [M, n]
    """
    inside = (offset >= 0) & (offset < K) & counted
    if REL:
        logits = tl.gather(by_offset, (offset & (WINDOW - 1)) + FIRST, 1)
    else:
        logits = tl.zeros(offset.shape, tl.float32)
    return tl.where(inside, logits, MASKED)


@triton.jit
def _collect(sums, place, wanted, n: tl.constexpr):
    """The transpose of `_spread`: sums [M, n or more] by row of the patch -> by offset; place [M, 2 * WINDOW]."""
    if n == 1:  # a gather from one column stops the compiler of Triton 3.3 to 3.8 in programs of several warps
        near = tl.broadcast_to(sums, place.shape[0], place.shape[1])
    else:
        near = tl.gather(sums, tl.minimum(tl.maximum(place, 0), n - 1), 1)
    return tl.where((place >= 0) & (place < n) & wanted, near, 0.0)


@triton.jit
def _logits(a, b, row, col, CONTENT: tl.constexpr):
    """a [I, DP], b [R * C, DP], row [I, R], col [I, C] -> logits [I, R * C] of all pairs, before the scale."""
    bias = (row[:, :, None] + col[:, None, :]).reshape(row.shape[0], row.shape[1] * col.shape[1])
    if CONTENT:
        bias = _product(a, tl.trans(b), bias)
    return bias


@triton.jit
def _keys(
    q, by_offset, by_col, key, value, shift_row, top, left, chunk, H, W, map_h, map_w,
    K: tl.constexpr, WINDOW: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, PW: tl.constexpr,
    MASK: tl.constexpr, CONTENT: tl.constexpr, RELATIVE: tl.constexpr,
):  # fmt: skip
    """A chunk of the patch of keys: key, value [P, DP], logits [M, P]."""
    near = tl.arange(0, ROWS * PW)
    near_row, near_col = chunk * ROWS + near // PW, near % PW
    v = _load_patch(value, top, left, near_row, near_col, H, W, map_h, map_w, MASK, D, DP)
    k = v
    if CONTENT:
        k = _load_patch(key, top, left, near_row, near_col, H, W, map_h, map_w, MASK, D, DP)
    place = chunk * ROWS + tl.arange(0, ROWS)[None, :]
    by_row = _spread(by_offset, shift_row + place, _counted(top, place, H, MASK), 0, K, WINDOW, RELATIVE)  # [M, ROWS]
    return k, v, _logits(q, k, by_row, by_col, CONTENT)


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    query, key, value, rel_row, rel_col, out, lse, map_b, map_h, map_w, out_b, out_h, out_w, first, H, W, scale,
    N: tl.constexpr, HEADS: tl.constexpr, K: tl.constexpr, WINDOW: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    TH: tl.constexpr, TW: tl.constexpr, ROWS: tl.constexpr, PW: tl.constexpr, CHUNKS: tl.constexpr,
    MASK: tl.constexpr, CONTENT: tl.constexpr, RELATIVE: tl.constexpr, FUSED: tl.constexpr,
):  # fmt: skip
    """Softmax at once where the patch is one chunk, else online over the chunks."""
    GROUPS: tl.constexpr = N // HEADS
    head = tl.program_id(0) % GROUPS * HEADS
    row, col = tl.program_id(1) * TH, tl.program_id(0) // GROUPS * TW  # of the tile
    batch = (tl.program_id(2) + first).to(tl.int64)
    top, left = _origin(row - (K - 1) // 2, MASK), _origin(col - (K - 1) // 2, MASK)  # of the patch

    pixel, channel = tl.arange(0, TH * TW), tl.arange(0, DP)[None, :]
    inside = (row + pixel // TW < H) & (col + pixel % TW < W)  # [M]
    own = inside[:, None] & (channel < D)
    tile_at = (pixel // TW * map_h + pixel % TW * map_w)[:, None] + channel
    out_at = (pixel // TW * out_h + pixel % TW * out_w)[:, None] + channel
    place = tl.arange(0, PW)[None, :]
    shift_row = (top - row + (K - 1) // 2 - pixel // TW)[:, None]
    offset_col = (left - col + (K - 1) // 2 - pixel % TW)[:, None] + place  # [M, PW]
    counted = _counted(left, place, W, MASK)

    query += batch * map_b + head * D
    patch = _at(top, left, map_h, map_w)
    if FUSED:
        key = query + N * D + patch
        value = query + N * D * (1 + CONTENT) + patch
    else:
        value += batch * map_b + head * D + patch
        if CONTENT:
            key += batch * map_b + head * D + patch
    query += _at(row, col, map_h, map_w)
    out += batch * out_b + head * D + _at(row, col, out_h, out_w)
    lse += (batch * N + head) * H * W + _at(row, col, W, 1)
    if RELATIVE:
        rel_row += head * (D // 2) * K
        rel_col += head * (D // 2) * K
    factor = scale * LOG2E
    for _head in tl.range(HEADS):
        q = tl.load(query + tile_at, mask=own, other=0.0)  # [M, DP]
        by_offset = q  # nothing where there are no embeddings
        if RELATIVE:
            table = _embedding_table(rel_row, rel_col, K, WINDOW, D, DP)
            by_offset = tl.dot(q, table, input_precision="ieee")  # [M, 2 * WINDOW]
        by_col = _spread(by_offset, offset_col, counted, WINDOW, K, WINDOW, RELATIVE)  # [M, PW]
        if CHUNKS == 1:
            _k, v, logits = _keys(q, by_offset, by_col, key, value, shift_row, top, left, 0, H, W, map_h, map_w,
                                  K, WINDOW, D, DP, ROWS, PW, MASK, CONTENT, RELATIVE)  # fmt: skip
            maximum = tl.maximum(tl.max(logits, 1), FLOOR)
            weights = tl.exp2(logits * factor - (maximum * factor)[:, None])
            total = tl.sum(weights, 1)
            mixed = tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        else:
            maximum = tl.full([TH * TW], FLOOR, tl.float32)
            total = tl.zeros([TH * TW], tl.float32)
            mixed = tl.zeros([TH * TW, DP], tl.float32)
            for chunk in tl.range(CHUNKS):
                _k, v, logits = _keys(q, by_offset, by_col, key, value, shift_row, top, left, chunk, H, W, map_h, map_w,
                                      K, WINDOW, D, DP, ROWS, PW, MASK, CONTENT, RELATIVE)  # fmt: skip
                highest = tl.maximum(maximum, tl.max(logits, 1))
                weights = tl.exp2(logits * factor - (highest * factor)[:, None])
                fade = tl.exp2((maximum - highest) * factor)
                total = total * fade + tl.sum(weights, 1)
                mixed = _product(weights.to(v.dtype), v, mixed * fade[:, None])
                maximum = highest
        total = tl.maximum(total, 1e-30, propagate_nan=tl.PropagateNan.ALL)  # 0 for pixels of a ragged tile: not stored
        tl.store(out + out_at, (mixed * (1.0 / total)[:, None]).to(out.dtype.element_ty), mask=own)
        tl.store(lse + pixel // TW * W + pixel % TW, maximum * scale + tl.log2(total) * LN2, mask=inside)
        query += D
        value += D
        out += D
        lse += H.to(tl.int64) * W
        if CONTENT:
            key += D
        if RELATIVE:
            rel_row += D // 2 * K
            rel_col += D // 2 * K


@triton.jit
def _query_chunk(
    q, g, mean, norm, factor, by_offset, by_col, key, value, grad_q, by_slot, sum_col,
    shift_row, top, left, chunk, H, W, map_h, map_w,
    K: tl.constexpr, WINDOW: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, PW: tl.constexpr,
    MASK: tl.constexpr, CONTENT: tl.constexpr, RELATIVE: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """Adds a chunk of keys to grad_q [M, DP] and to the sums of the logits' gradients.

    Those by offset of the row in by_slot [M, 2 * WINDOW], those by column of the patch in sum_col [M, COLS]. SUMS: by
    products with one-hot matrices instead of additions across threads.
    """
    k, v, logits = _keys(q, by_offset, by_col, key, value, shift_row, top, left, chunk, H, W, map_h, map_w,
                         K, WINDOW, D, DP, ROWS, PW, MASK, CONTENT, RELATIVE)  # fmt: skip
    M: tl.constexpr = logits.shape[0]
    P: tl.constexpr = ROWS * PW
    weights = tl.exp2(logits * factor - norm[:, None])
    grad = weights * _product(g, tl.trans(v), tl.broadcast_to(-mean[:, None], M, P))  # of the scaled logits
    low = grad.to(k.dtype)
    if CONTENT:
        grad_q = _product(low, k, grad_q)
    if RELATIVE:
        slot = tl.arange(0, 2 * WINDOW)[None, :]
        if SUMS:
            near = tl.arange(0, P)[:, None]
            of_row = (near // PW == tl.arange(0, 16)[None, :]).to(k.dtype)  # ROWS of its 16 columns are used
            by_row = tl.dot(low, of_row, input_precision="ieee")
            of_col = (near % PW == tl.arange(0, sum_col.shape[1])[None, :]).to(k.dtype)
            sum_col = _product(low, of_col, sum_col)
        else:
            by_place = grad.reshape(M, ROWS, PW)
            by_row = tl.sum(by_place, 2)
            sum_col += tl.sum(by_place, 1)
        by_slot += _collect(by_row, slot - shift_row - chunk * ROWS, slot < K, ROWS)
    return grad_q, by_slot, sum_col


@triton.jit(do_not_specialize=SIZES)
def query_kernel(
    grad_out, query, key, value, rel_row, rel_col, out, lse, delta, grad_query, partial,
    grad_b, grad_h, grad_w, map_b, map_h, map_w, out_b, out_h, out_w, into_b, into_h, into_w,
    first, H, W, tiles_h, strips, scale,
    N: tl.constexpr, K: tl.constexpr, WINDOW: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    TH: tl.constexpr, TW: tl.constexpr, ROWS: tl.constexpr, PW: tl.constexpr, CHUNKS: tl.constexpr,
    MASK: tl.constexpr, CONTENT: tl.constexpr, RELATIVE: tl.constexpr, FUSED: tl.constexpr,
    STRIP: tl.constexpr, SUMS: tl.constexpr, COLS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    head, tile_col = tl.program_id(0) % N, tl.program_id(0) // N
    strip = tl.program_id(1)
    batch = (tl.program_id(2) + first).to(tl.int64)
    col = tile_col * TW
    left = _origin(col - (K - 1) // 2, MASK)

    pixel, channel = tl.arange(0, TH * TW), tl.arange(0, DP)[None, :]
    tile_cols = col + pixel % TW < W
    place = tl.arange(0, PW)[None, :]
    shift_col = (left - col + (K - 1) // 2 - pixel % TW)[:, None]
    counted = _counted(left, place, W, MASK)
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
        table = _embedding_table(rel_row + head * (D // 2) * K, rel_col + head * (D // 2) * K, K, WINDOW, D, DP)
        grad_table = tl.zeros([DP, 2 * WINDOW], tl.float32)

    for tile_row in tl.range(strip * STRIP, tl.minimum(strip * STRIP + STRIP, tiles_h)):
        row = tile_row * TH
        top = _origin(row - (K - 1) // 2, MASK)
        shift_row = (top - row + (K - 1) // 2 - pixel // TW)[:, None]
        inside = (row + pixel // TW < H) & tile_cols  # [M]
        own = inside[:, None] & (channel < D)
        q = tl.load(query + _at(row, col, map_h, map_w) + (pixel // TW * map_h + pixel % TW * map_w)[:, None] + channel,
                    mask=own, other=0.0)  # fmt: skip
        g = tl.load(grad_out + _at(row, col, grad_h, grad_w)
                    + (pixel // TW * grad_h + pixel % TW * grad_w)[:, None] + channel, mask=own, other=0.0)  # fmt: skip
        o = tl.load(out + _at(row, col, out_h, out_w) + (pixel // TW * out_h + pixel % TW * out_w)[:, None] + channel,
                    mask=own, other=0.0)  # fmt: skip
        mean = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)  # delta: sum of P dP over the window
        scalars = _at(row, col, W, 1) + pixel // TW * W + pixel % TW
        tl.store(delta + scalars, mean, mask=inside)
        norm = tl.load(lse + scalars, mask=inside, other=0.0) * LOG2E

        by_offset = q
        if RELATIVE:
            by_offset = tl.dot(q, table, input_precision="ieee")  # [M, 2 * WINDOW]
        by_col = _spread(by_offset, shift_col + place, counted, WINDOW, K, WINDOW, RELATIVE)  # [M, PW]
        patch = _at(top, left, map_h, map_w)
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
                    K, WINDOW, D, DP, ROWS, PW, MASK, CONTENT, RELATIVE, SUMS,
                )  # fmt: skip
        else:
            for chunk in tl.range(CHUNKS):
                grad_q, by_slot, sum_col = _query_chunk(
                    q, g, mean, norm, factor, by_offset, by_col, keys, value + patch, grad_q, by_slot, sum_col,
                    shift_row, top, left, chunk, H, W, map_h, map_w,
                    K, WINDOW, D, DP, ROWS, PW, MASK, CONTENT, RELATIVE, SUMS,
                )  # fmt: skip
        if RELATIVE:
            of_col = (slot >= WINDOW) & (slot < WINDOW + K)
            by_slot += _collect(sum_col, slot - WINDOW - shift_col, of_col, PW)
            low = by_slot.to(q.dtype)
            grad_q = _product(low, tl.trans(table), grad_q)
            grad_table = _product(tl.trans(q), low, grad_table)
        into = grad_query + _at(row, col, into_h, into_w)
        into_at = (pixel // TW * into_h + pixel % TW * into_w)[:, None] + channel
        tl.store(into + into_at, (grad_q * scale).to(grad_query.dtype.element_ty), mask=own)

    if RELATIVE:  # rows' offsets count in the first half of the channels, columns' in the second
        half: tl.constexpr = D // 2
        channel = tl.arange(0, DP)[:, None]
        offset = tl.where(channel < half, slot, slot - WINDOW)
        tiles_w = tl.num_programs(0) // N
        partial += (((batch * strips + strip) * tiles_w + tile_col) * N + head) * D * K
        tl.store(partial + channel * K + offset, grad_table * scale,
                 mask=(channel < D) & (offset >= 0) & (offset < K))  # fmt: skip


@triton.jit
def _key_chunk(
    query, grad_out, lse, delta, k, v, table, factor, grad_k, grad_v, key_row, key_col, top, left, chunk, H, W,
    map_h, map_w, grad_h, grad_w,
    K: tl.constexpr, WINDOW: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr,
    ROWS: tl.constexpr, PW: tl.constexpr, CONTENT: tl.constexpr, RELATIVE: tl.constexpr,
):  # fmt: skip
    """Adds a chunk of queries to grad_k, grad_v [M, DP]. key_row, key_col: offset of the tile's first key, [P, 1].

    The queries are the rows of all products, as in the other kernels: turned round, it cost half more.
    """
    near = tl.arange(0, ROWS * PW)
    near_row, near_col = chunk * ROWS + near // PW, near % PW
    q = _load_patch(query, top, left, near_row, near_col, H, W, map_h, map_w, True, D, DP)
    g = _load_patch(grad_out, top, left, near_row, near_col, H, W, grad_h, grad_w, True, D, DP)
    inside = (top + near_row < H) & (left + near_col < W)
    scalar = near_row * W + near_col
    norm = tl.load(lse + scalar, mask=inside, other=-FLOOR) * LOG2E  # a query outside the map gets weights of 0
    by_offset = q
    if RELATIVE:
        by_offset = tl.dot(q, table, input_precision="ieee")  # [P, 2 * WINDOW]
    place_row, place_col = tl.arange(0, TH)[None, :], tl.arange(0, TW)[None, :]
    row = _spread(by_offset, key_row - chunk * ROWS + place_row, place_row >= 0, 0, K, WINDOW, RELATIVE)  # [P, TH]
    col = _spread(by_offset, key_col + place_col, place_col >= 0, WINDOW, K, WINDOW, RELATIVE)  # [P, TW]
    weights = tl.exp2(_logits(q, k, row, col, CONTENT) * factor - norm[:, None])  # [P, M]
    grad_v = _product(tl.trans(weights.to(g.dtype)), g, grad_v)
    if CONTENT:
        mean = tl.load(delta + scalar, mask=inside, other=0.0)
        grad = weights * _product(g, tl.trans(v), tl.broadcast_to(-mean[:, None], ROWS * PW, TH * TW))
        grad_k = _product(tl.trans(grad.to(q.dtype)), q, grad_k)
    return grad_k, grad_v


@triton.jit(do_not_specialize=SIZES)
def key_kernel(
    grad_out, query, key, value, rel_row, rel_col, lse, delta, grad_key, grad_value,
    grad_b, grad_h, grad_w, map_b, map_h, map_w, into_b, into_h, into_w, first, H, W, scale,
    N: tl.constexpr, HEADS: tl.constexpr, K: tl.constexpr, WINDOW: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    TH: tl.constexpr, TW: tl.constexpr, ROWS: tl.constexpr, PW: tl.constexpr, CHUNKS: tl.constexpr,
    CONTENT: tl.constexpr, RELATIVE: tl.constexpr, FUSED: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    GROUPS: tl.constexpr = N // HEADS
    head = tl.program_id(0) % GROUPS * HEADS
    row, col = tl.program_id(1) * TH, tl.program_id(0) // GROUPS * TW  # of the tile of keys
    batch = (tl.program_id(2) + first).to(tl.int64)
    # A key at h is in the windows of the queries from h - K // 2 to h + (K - 1) // 2.
    top, left = _origin(row - K // 2, True), _origin(col - K // 2, True)

    pixel, near, channel = tl.arange(0, TH * TW), tl.arange(0, ROWS * PW), tl.arange(0, DP)[None, :]
    own = ((row + pixel // TW < H) & (col + pixel % TW < W))[:, None] & (channel < D)
    tile_at = (pixel // TW * map_h + pixel % TW * map_w)[:, None] + channel
    into_at = (pixel // TW * into_h + pixel % TW * into_w)[:, None] + channel
    key_row = (row - top + (K - 1) // 2 - near // PW)[:, None]
    key_col = (col - left + (K - 1) // 2 - near % PW)[:, None]

    query += batch * map_b + head * D
    tile = _at(row, col, map_h, map_w)
    if FUSED:
        key = query + N * D + tile
        value = query + N * D * (1 + CONTENT) + tile
    else:
        value += batch * map_b + head * D + tile
        if CONTENT:
            key += batch * map_b + head * D + tile
    query += _at(top, left, map_h, map_w)
    grad_out += batch * grad_b + head * D + _at(top, left, grad_h, grad_w)
    into = batch * into_b + head * D + _at(row, col, into_h, into_w)
    if CONTENT:
        grad_key += into
    if FUSED and CONTENT:
        grad_value = grad_key + N * D
    else:
        grad_value += into
    scalars = (batch * N + head) * H * W + _at(top, left, W, 1)
    lse += scalars
    delta += scalars
    if RELATIVE:
        rel_row += head * (D // 2) * K
        rel_col += head * (D // 2) * K
    factor = scale * LOG2E
    for _head in tl.range(HEADS):
        v = tl.load(value + tile_at, mask=own, other=0.0)  # [M, DP]
        k = v
        if CONTENT:
            k = tl.load(key + tile_at, mask=own, other=0.0)
        table = v
        if RELATIVE:
            table = _embedding_table(rel_row, rel_col, K, WINDOW, D, DP)
        grad_k = tl.zeros([TH * TW, DP], tl.float32)
        grad_v = tl.zeros([TH * TW, DP], tl.float32)
        if UNROLL:
            for chunk in tl.static_range(CHUNKS):
                grad_k, grad_v = _key_chunk(
                    query, grad_out, lse, delta, k, v, table, factor, grad_k, grad_v, key_row, key_col, top, left,
                    chunk, H, W, map_h, map_w, grad_h, grad_w,
                    K, WINDOW, D, DP, TH, TW, ROWS, PW, CONTENT, RELATIVE,
                )  # fmt: skip
        else:
            for chunk in tl.range(CHUNKS):
                grad_k, grad_v = _key_chunk(
                    query, grad_out, lse, delta, k, v, table, factor, grad_k, grad_v, key_row, key_col, top, left,
                    chunk, H, W, map_h, map_w, grad_h, grad_w,
                    K, WINDOW, D, DP, TH, TW, ROWS, PW, CONTENT, RELATIVE,
                )  # fmt: skip
        tl.store(grad_value + into_at, grad_v.to(grad_value.dtype.element_ty), mask=own)
        if CONTENT:
            tl.store(grad_key + into_at, (grad_k * scale).to(grad_key.dtype.element_ty), mask=own)
            key += D
            grad_key += D
        query += D
        value += D
        grad_out += D
        grad_value += D
        lse += H.to(tl.int64) * W
        delta += H.to(tl.int64) * W
        if RELATIVE:
            rel_row += D // 2 * K
            rel_col += D // 2 * K
