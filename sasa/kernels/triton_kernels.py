"""The device side of backend "triton": three kernels of fused local attention, and what they share.

A program serves one tile of TH x TW pixels of one head. All windows of the tile lie in one patch, the tile with its
halo, so the logits of the tile are one product (pixels of the tile) x (pixels of the patch), taken in CHUNKS of
ROWS x PW patch pixels. Relative logits, window and border are separable: a number per offset in the window and pixel,
spread over the rows and over the columns of the patch by a gather of 16 numbers; a pair that a row or a column excludes
gets MASKED there, and nothing is compared on the whole tile x patch.

    forward_kernel   a tile of queries, its patch of keys: out and log-sum-exp, softmax online over the chunks
    query_kernel     a tile of queries after the other of a vertical strip: gradient of the query, delta for the next
                     kernel, the embeddings' gradient summed over the strip
    key_kernel       a tile of keys, the patch of queries that see it: gradients of key and value

No atomics: each number has one program that writes it. The work on a tile starts at a program id in which the head runs
fastest, so neighbouring programs read neighbouring memory.

Shapes: B batch, N heads, D head width, DP D padded to a power of 2 of at least 16, H x W map, K window side; in
brackets those of tiles: M = TH * TW pixels of a tile, P = ROWS * PW pixels of a chunk. Channels have stride 1 and heads
stride D; strides of B, H and W are arguments. Logits are kept in base 2.
"""

import triton
import triton.language as tl

MASKED = tl.constexpr(-1e30)  # not -inf: a pixel of a ragged tile may have no key at all, and inf - inf is NaN
FLOOR = tl.constexpr(-1e29)  # of the running maximum: exp2(MASKED - FLOOR) is 0
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
WINDOW = tl.constexpr(16)  # K padded, what a product takes

SIZES = ["N", "H", "W", "tiles_h", "tiles_w", "strips"]  # plain numbers: no variant for sizes of 1 or multiples of 16


@triton.jit
def _place(pid, N, tiles_w, tiles_h):
    """Program id -> batch index in 64 bits, head, row and column of tiles."""
    head = pid % N
    tile = pid // N
    return (tile // (tiles_w * tiles_h)).to(tl.int64), head, tile // tiles_w % tiles_h, tile % tiles_w


@triton.jit
def _origin(first, CLAMP: tl.constexpr):
    """Where a patch starts. A clamped one need not be larger than the map, and begins on it."""
    if CLAMP:
        first = tl.maximum(first, 0)
    return first


@triton.jit
def _load(base, stride_h, stride_w, rows, cols, H, W, D: tl.constexpr, DP: tl.constexpr):
    """Pixels of one head's map: rows, cols [P] -> [P, DP], 0 outside the map and beyond D."""
    channel = tl.arange(0, DP)
    inside = (rows >= 0) & (rows < H) & (cols >= 0) & (cols < W)
    offset = (rows * stride_h + cols * stride_w)[:, None] + channel[None, :]
    return tl.load(base + offset, mask=inside[:, None] & (channel < D)[None, :], other=0.0)


@triton.jit
def _store(base, stride_h, stride_w, rows, cols, x, H, W, D: tl.constexpr, DP: tl.constexpr):
    channel = tl.arange(0, DP)
    inside = (rows < H) & (cols < W)
    offset = (rows * stride_h + cols * stride_w)[:, None] + channel[None, :]
    tl.store(base + offset, x.to(base.dtype.element_ty), mask=inside[:, None] & (channel < D)[None, :])


@triton.jit
def _embedding(base, first, K: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    """A head's row (first = 0) or column (first = D / 2) embedding (D / 2, K) in place: [DP, WINDOW], else 0."""
    channel = tl.arange(0, DP)[:, None] - first
    offset = tl.arange(0, WINDOW)[None, :]
    mask = (channel >= 0) & (channel < D // 2) & (offset < K)
    return tl.load(base + channel * K + offset, mask=mask, other=0.0)


@triton.jit
def _spread(table, shift, place, inside, K: tl.constexpr, RELATIVE: tl.constexpr):
    """A number per offset in the window -> per row (or column) of the patch, MASKED outside the window and the map.

    table [M, WINDOW]; shift [M] + place [n] is the offset; inside [n] -> [M, n]
    """
    offset = shift[:, None] + place[None, :]
    valid = (offset >= 0) & (offset < K) & inside[None, :]
    if RELATIVE:
        near = tl.gather(table, tl.minimum(tl.maximum(offset, 0), WINDOW - 1), 1)
        return tl.where(valid, near, MASKED)
    return tl.where(valid, 0.0, MASKED)


@triton.jit
def _collect(sums, shift, n: tl.constexpr, K: tl.constexpr):
    """The transpose of `_spread`: sums [M, n] per row (or column) of the patch -> [M, WINDOW] per offset."""
    offset = tl.arange(0, WINDOW)[None, :]
    place = offset - shift[:, None]
    near = tl.gather(sums, tl.minimum(tl.maximum(place, 0), n - 1), 1)
    return tl.where((place >= 0) & (place < n) & (offset < K), near, 0.0)


@triton.jit
def _product(a, b, like):
    """a [I, J] x b [J, L] -> [I, L] in fp32, a rounded to the type of `like`. fp32 stays fp32: no TF32."""
    return tl.dot(a.to(like.dtype), b, input_precision="ieee")


@triton.jit
def _logits(a, b, row, col, logit_scale, R: tl.constexpr, C: tl.constexpr, CONTENT: tl.constexpr):
    """a [I, DP], b [R * C, DP], row [I, R], col [I, C] -> logits [I, R, C] of all pairs, in base 2."""
    bias = row[:, :, None] + col[:, None, :]
    if CONTENT:
        pairs = _product(a, tl.trans(b), b)
        bias = pairs.reshape(a.shape[0], R, C) * logit_scale + bias
    return bias


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    query, key, value, rel_row, rel_col, out, lse,
    query_b, query_h, query_w, key_b, key_h, key_w, value_b, value_h, value_w, out_b, out_h, out_w,
    N, H, W, tiles_h, tiles_w, scale,
    K: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr,
    ROWS: tl.constexpr, PW: tl.constexpr, CHUNKS: tl.constexpr,
    MASK: tl.constexpr, CONTENT: tl.constexpr, RELATIVE: tl.constexpr,
):  # fmt: skip
    batch, head, tile_row, tile_col = _place(tl.program_id(0), N, tiles_w, tiles_h)
    pixel = tl.arange(0, TH * TW)
    rows, cols = tile_row * TH + pixel // TW, tile_col * TW + pixel % TW  # [M]
    q = _load(query + batch * query_b + head * D, query_h, query_w, rows, cols, H, W, D, DP)  # [M, DP]
    top = _origin(tile_row * TH - (K - 1) // 2, MASK)
    left = _origin(tile_col * TW - (K - 1) // 2, MASK)
    shift_row, shift_col = top - rows + (K - 1) // 2, left - cols + (K - 1) // 2

    logit_scale = scale * LOG2E
    by_row, by_col = q, q  # nothing where there are no embeddings
    if RELATIVE:
        half: tl.constexpr = D // 2
        by_row = _product(q, _embedding(rel_row + head * half * K, 0, K, D, DP), q) * logit_scale  # [M, WINDOW]
        by_col = _product(q, _embedding(rel_col + head * half * K, half, K, D, DP), q) * logit_scale
    place_col = tl.arange(0, PW)
    col = _spread(by_col, shift_col, place_col, (left + place_col < W) | (not MASK), K, RELATIVE)  # [M, PW]

    maximum = tl.full([TH * TW], FLOOR, tl.float32)
    total = tl.zeros([TH * TW], tl.float32)
    mixed = tl.zeros([TH * TW, DP], tl.float32)
    near = tl.arange(0, ROWS * PW)
    for chunk in tl.range(CHUNKS):
        key_rows, key_cols = top + chunk * ROWS + near // PW, left + near % PW  # [P]
        v = _load(value + batch * value_b + head * D, value_h, value_w, key_rows, key_cols, H, W, D, DP)
        k = v
        if CONTENT:
            k = _load(key + batch * key_b + head * D, key_h, key_w, key_rows, key_cols, H, W, D, DP)
        place_row = chunk * ROWS + tl.arange(0, ROWS)
        row = _spread(by_row, shift_row, place_row, (top + place_row < H) | (not MASK), K, RELATIVE)  # [M, ROWS]
        logits = _logits(q, k, row, col, logit_scale, ROWS, PW, CONTENT).reshape(TH * TW, ROWS * PW)
        highest = tl.maximum(maximum, tl.max(logits, 1))
        weights = tl.exp2(logits - highest[:, None])
        fade = tl.exp2(maximum - highest)
        total = total * fade + tl.sum(weights, 1)
        mixed = mixed * fade[:, None] + _product(weights, v, v)
        maximum = highest

    total = tl.maximum(total, 1e-30)  # 0 for pixels of a ragged tile alone, which are not stored
    _store(out + batch * out_b + head * D, out_h, out_w, rows, cols, mixed / total[:, None], H, W, D, DP)
    inside = (rows < H) & (cols < W)
    tl.store(lse + (batch * N + head) * H * W + rows * W + cols, (maximum + tl.log2(total)) * LN2, mask=inside)


@triton.jit(do_not_specialize=SIZES)
def query_kernel(
    grad_out, query, key, value, rel_row, rel_col, out, lse, delta, grad_query, partial,
    grad_b, grad_h, grad_w, query_b, query_h, query_w, key_b, key_h, key_w, value_b, value_h, value_w,
    out_b, out_h, out_w, into_b, into_h, into_w,
    N, H, W, tiles_h, tiles_w, strips, scale,
    K: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr,
    ROWS: tl.constexpr, PW: tl.constexpr, CHUNKS: tl.constexpr,
    MASK: tl.constexpr, CONTENT: tl.constexpr, RELATIVE: tl.constexpr, STRIP: tl.constexpr,
):  # fmt: skip
    batch, head, strip, tile_col = _place(tl.program_id(0), N, tiles_w, strips)
    pixel = tl.arange(0, TH * TW)
    cols = tile_col * TW + pixel % TW  # [M]
    left = _origin(tile_col * TW - (K - 1) // 2, MASK)
    shift_col = left - cols + (K - 1) // 2
    place_col = tl.arange(0, PW)
    near = tl.arange(0, ROWS * PW)
    logit_scale = scale * LOG2E
    half: tl.constexpr = D // 2
    channel = tl.arange(0, DP)[None, :]
    if RELATIVE:
        table_row = _embedding(rel_row + head * half * K, 0, K, D, DP)  # [DP, WINDOW]
        table_col = _embedding(rel_col + head * half * K, half, K, D, DP)
    grad_tables = tl.zeros([DP, WINDOW], tl.float32)  # of the row embedding in its channels, of the column's in its

    for tile_row in tl.range(strip * STRIP, tl.minimum(strip * STRIP + STRIP, tiles_h)):
        rows = tile_row * TH + pixel // TW
        top = _origin(tile_row * TH - (K - 1) // 2, MASK)
        shift_row = top - rows + (K - 1) // 2
        q = _load(query + batch * query_b + head * D, query_h, query_w, rows, cols, H, W, D, DP)  # [M, DP]
        g = _load(grad_out + batch * grad_b + head * D, grad_h, grad_w, rows, cols, H, W, D, DP)
        o = _load(out + batch * out_b + head * D, out_h, out_w, rows, cols, H, W, D, DP)
        mean = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)  # delta: sum of P dP over the window
        inside = (rows < H) & (cols < W)
        image = (batch * N + head) * H * W
        tl.store(delta + image + rows * W + cols, mean, mask=inside)
        norm = tl.load(lse + image + rows * W + cols, mask=inside, other=0.0) * LOG2E

        by_row, by_col = q, q
        if RELATIVE:
            by_row = _product(q, table_row, q) * logit_scale  # [M, WINDOW]
            by_col = _product(q, table_col, q) * logit_scale
        col = _spread(by_col, shift_col, place_col, (left + place_col < W) | (not MASK), K, RELATIVE) - norm[:, None]
        grad_q = tl.zeros([TH * TW, DP], tl.float32)
        grad_row = tl.zeros([TH * TW, WINDOW], tl.float32)  # by offset in the window
        grad_col = tl.zeros([TH * TW, PW], tl.float32)  # by column of the patch
        for chunk in tl.range(CHUNKS):
            key_rows, key_cols = top + chunk * ROWS + near // PW, left + near % PW  # [P]
            v = _load(value + batch * value_b + head * D, value_h, value_w, key_rows, key_cols, H, W, D, DP)
            k = v
            if CONTENT:
                k = _load(key + batch * key_b + head * D, key_h, key_w, key_rows, key_cols, H, W, D, DP)
            place_row = chunk * ROWS + tl.arange(0, ROWS)
            row = _spread(by_row, shift_row, place_row, (top + place_row < H) | (not MASK), K, RELATIVE)  # [M, ROWS]
            weights = tl.exp2(_logits(q, k, row, col, logit_scale, ROWS, PW, CONTENT)).reshape(TH * TW, ROWS * PW)
            grad = weights * (_product(g, tl.trans(v), v) - mean[:, None])  # of the logits
            if CONTENT:
                grad_q += _product(grad, k, k)
            if RELATIVE:
                by_place = grad.reshape(TH * TW, ROWS, PW)
                grad_row += _collect(tl.sum(by_place, 2), shift_row + chunk * ROWS, ROWS, K)
                grad_col += tl.sum(by_place, 1)
        if RELATIVE:
            grad_row = grad_row.to(q.dtype)
            grad_col = _collect(grad_col, shift_col, PW, K).to(q.dtype)  # [M, WINDOW]
            grad_q += _product(grad_row, tl.trans(table_row), q) + _product(grad_col, tl.trans(table_col), q)
            grad_tables += _product(tl.trans(tl.where(channel < half, q, 0.0)), grad_row, q)
            grad_tables += _product(tl.trans(tl.where(channel < half, 0.0, q)), grad_col, q)
        into = grad_query + batch * into_b + head * D
        _store(into, into_h, into_w, rows, cols, grad_q * scale, H, W, D, DP)

    if RELATIVE:
        channel = tl.arange(0, DP)[:, None]
        offset = tl.arange(0, WINDOW)[None, :]
        into = partial + ((batch * strips + strip) * tiles_w + tile_col) * N * D * K + head * D * K
        tl.store(into + channel * K + offset, grad_tables * scale, mask=(channel < D) & (offset < K))


@triton.jit(do_not_specialize=SIZES)
def key_kernel(
    grad_out, query, key, value, rel_row, rel_col, lse, delta, grad_key, grad_value,
    grad_b, grad_h, grad_w, query_b, query_h, query_w, key_b, key_h, key_w, value_b, value_h, value_w,
    into_key_b, into_key_h, into_key_w, into_value_b, into_value_h, into_value_w,
    N, H, W, tiles_h, tiles_w, scale,
    K: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr,
    ROWS: tl.constexpr, PW: tl.constexpr, CHUNKS: tl.constexpr,
    CONTENT: tl.constexpr, RELATIVE: tl.constexpr,
):  # fmt: skip
    """The queries are the rows of all products, as in the other kernels: turned round, it cost half more."""
    batch, head, tile_row, tile_col = _place(tl.program_id(0), N, tiles_w, tiles_h)
    pixel = tl.arange(0, TH * TW)
    rows, cols = tile_row * TH + pixel // TW, tile_col * TW + pixel % TW  # [M], of keys
    v = _load(value + batch * value_b + head * D, value_h, value_w, rows, cols, H, W, D, DP)  # [M, DP]
    k = v
    if CONTENT:
        k = _load(key + batch * key_b + head * D, key_h, key_w, rows, cols, H, W, D, DP)
    # A key at h is in the windows of the queries from h - K // 2 to h + (K - 1) // 2.
    top = _origin(tile_row * TH - K // 2, True)
    left = _origin(tile_col * TW - K // 2, True)
    logit_scale = scale * LOG2E
    half: tl.constexpr = D // 2
    if RELATIVE:
        table_row = _embedding(rel_row + head * half * K, 0, K, D, DP)  # [DP, WINDOW]
        table_col = _embedding(rel_col + head * half * K, half, K, D, DP)
    key_rows, key_cols = tl.arange(0, TH), tl.arange(0, TW)

    grad_k = tl.zeros([TH * TW, DP], tl.float32)
    grad_v = tl.zeros([TH * TW, DP], tl.float32)
    near = tl.arange(0, ROWS * PW)
    for chunk in tl.range(CHUNKS):
        query_rows, query_cols = top + chunk * ROWS + near // PW, left + near % PW  # [P]
        q = _load(query + batch * query_b + head * D, query_h, query_w, query_rows, query_cols, H, W, D, DP)
        g = _load(grad_out + batch * grad_b + head * D, grad_h, grad_w, query_rows, query_cols, H, W, D, DP)
        inside = (query_rows < H) & (query_cols < W)
        image, index = (batch * N + head) * H * W, query_rows * W + query_cols
        norm = tl.load(lse + image + index, mask=inside, other=0.0) * LOG2E
        by_row, by_col = q, q
        if RELATIVE:
            by_row = _product(q, table_row, q) * logit_scale  # [P, WINDOW]
            by_col = _product(q, table_col, q) * logit_scale
        shift_row, shift_col = tile_row * TH - query_rows + (K - 1) // 2, tile_col * TW - query_cols + (K - 1) // 2
        row = _spread(by_row, shift_row, key_rows, key_rows >= 0, K, RELATIVE) - norm[:, None]  # [P, TH]
        col = _spread(by_col, shift_col, key_cols, key_cols >= 0, K, RELATIVE)  # [P, TW]
        # Queries outside the map have a q and a g of 0, and give nothing.
        weights = tl.exp2(_logits(q, k, row, col, logit_scale, TH, TW, CONTENT)).reshape(ROWS * PW, TH * TW)
        grad_v += tl.dot(tl.trans(weights.to(g.dtype)), g, input_precision="ieee")
        if CONTENT:
            mean = tl.load(delta + image + index, mask=inside, other=0.0)
            grad = weights * (_product(g, tl.trans(v), v) - mean[:, None])  # of the logits
            grad_k += tl.dot(tl.trans(grad.to(q.dtype)), q, input_precision="ieee")

    into = grad_value + batch * into_value_b + head * D
    _store(into, into_value_h, into_value_w, rows, cols, grad_v, H, W, D, DP)
    if CONTENT:
        into = grad_key + batch * into_key_b + head * D
        _store(into, into_key_h, into_key_w, rows, cols, grad_k * scale, H, W, D, DP)
