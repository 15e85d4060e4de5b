"""What the kernels of triton_kernels.py and triton_gradients.py share: patches, windows and embeddings as logits, NaN.

Shapes as there.
"""

import triton
import triton.language as tl

MASKED = tl.constexpr(-1e30)  # not -inf: a pixel of a ragged tile may have no key at all, and inf - inf is NaN
FLOOR = tl.constexpr(-1e29)  # of the maximum: exp2(MASKED - FLOOR) is 0
LOG2E = tl.constexpr(1.4426950408889634)
INFINITY = tl.constexpr(float("inf"))
LN2 = tl.constexpr(0.6931471805599453)

COLUMNS = tl.constexpr(8 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 6) else 16)  # a product's least

SIZES = ["first", "H", "W", "tiles_h", "strips"]  # plain numbers: no variant for sizes of 1 or multiples of 16


@triton.jit
def product(a, b, start):
    """a [I, J] x b [J, L] + start [I, L], in fp32. fp32 stays fp32: no TF32."""
    return tl.dot(a, b, start, input_precision="ieee")


@triton.jit
def origin(first, CLAMP: tl.constexpr):
    """Where a patch starts. A clamped one need not be larger than the map, and begins on it."""
    if CLAMP:
        first = tl.maximum(first, 0)
    return first


@triton.jit
def load_patch(base, top, left, row, col, H, W, stride_h, stride_w, CLAMP: tl.constexpr, D: tl.constexpr,
               DP: tl.constexpr, REPAIR: tl.constexpr):  # fmt: skip
    """Pixels row, col [P] of the patch at top, left, whose first pixel is at `base`: [P, DP].

    Outside the map they are 0, or with CLAMP any pixel of the map, which the caller leaves out: masked loads cost more.
    REPAIR: a pixel that holds NaN or infinity is 0 too.
    """
    channel = tl.arange(0, DP)[None, :]
    if CLAMP and DP % D == 0:  # channels beyond D count nowhere, so they may be those of the head once more
        row, col = tl.minimum(row, H - 1 - top), tl.minimum(col, W - 1 - left)
        place = base + (row * stride_h + col * stride_w)[:, None] + channel % D
        x = tl.load(place)
        if REPAIR:  # read again: that takes fewer registers than a choice for each number
            x = tl.load(place, mask=lost_pixels(x)[:, None] == 0, other=0.0)
    else:
        inside = (top + row >= 0) & (top + row < H) & (left + col >= 0) & (left + col < W)
        place = base + (row * stride_h + col * stride_w)[:, None] + channel
        wanted = inside[:, None] & (channel < D)
        x = tl.load(place, mask=wanted, other=0.0)
        if REPAIR:
            x = tl.load(place, mask=wanted & (lost_pixels(x)[:, None] == 0), other=0.0)
    return x


@triton.jit
def takes_part(first, place, size, MASK: tl.constexpr):
    """Which of them take part in the softmax: those on the map, or all where the border is zero."""
    if MASK:
        counted = first + place < size
    else:
        counted = place >= 0
    return counted


@triton.jit
def offset_of(row, col, stride_h, stride_w):
    """The offset of the first pixel of a tile or patch, in 64 bits."""
    return row.to(tl.int64) * stride_h + col.to(tl.int64) * stride_w


@triton.jit
def embedding_table(rel_row, rel_col, K: tl.constexpr, WINDOW: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    """A head's embeddings (D / 2, K) as one table [DP, 2 * WINDOW]: the row's channels and offsets first, else 0."""
    half: tl.constexpr = D // 2
    channel = tl.arange(0, DP)[:, None]
    offset = tl.arange(0, 2 * WINDOW)[None, :]
    of_row = tl.load(rel_row + channel * K + offset, mask=(channel < half) & (offset < K), other=0.0)
    col_mask = (channel >= half) & (channel < D) & (offset >= WINDOW) & (offset < WINDOW + K)
    of_col = tl.load(rel_col + (channel - half) * K + (offset - WINDOW), mask=col_mask, other=0.0)
    return of_row + of_col


@triton.jit
def spread(by_offset, offset, counted, FIRST: tl.constexpr, K: tl.constexpr, WINDOW: tl.constexpr, REL: tl.constexpr):
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
def collect(sums, place, wanted, n: tl.constexpr):
    """The transpose of `spread`: sums [M, n or more] by row of the patch -> by offset; place [M, 2 * WINDOW]."""
    if n == 1:  # a gather from one column stops the compiler of Triton 3.3 to 3.8 in programs of several warps
        near = tl.broadcast_to(sums, place.shape[0], place.shape[1])
    else:
        near = tl.gather(sums, tl.minimum(tl.maximum(place, 0), n - 1), 1)
    return tl.where((place >= 0) & (place < n) & wanted, near, 0.0)


@triton.jit
def pair_logits(a, b, row, col, CONTENT: tl.constexpr):
    """a [I, DP], b [R * C, DP], row [I, R], col [I, C] -> logits [I, R * C] of all pairs, before the scale."""
    bias = (row[:, :, None] + col[:, None, :]).reshape(row.shape[0], row.shape[1] * col.shape[1])
    if CONTENT:
        bias = product(a, tl.trans(b), bias)
    return bias


@triton.jit
def is_finite(x):
    return tl.abs(x.to(tl.float32)) < INFINITY


@triton.jit
def lost_pixels(x):
    """x [P, DP] -> 1 for pixels that hold NaN or infinity, else 0: [P]"""
    return 1 - tl.min(is_finite(x).to(tl.int32), 1)


@triton.jit
def add_up(results, sums):
    """Adds the sums of the rows of `results` [M, DP], as they are stored, to each column of `sums` [M, COLUMNS].

    They are finite only where all results are. A product is cheaper than additions.
    """
    return product(results, tl.full([results.shape[1], sums.shape[1]], 1, results.dtype), sums)


@triton.jit
def all_finite(sums):
    """Whether all results that were added to `sums` are finite."""
    return is_finite(tl.sum(tl.sum(sums, 1), 0))


@triton.jit
def hold(in_row, in_cols, lost):
    """Which windows hold one of the lost pixels [PW] of a row: in_row [M, 1], in_cols [M, PW] -> 0 or 1 [M]"""
    return tl.max((in_row & in_cols).to(tl.int32) * lost[None, :], 1)


@triton.jit
def load_keys(
    q, by_offset, by_col, key, value, shift_row, top, left, chunk, H, W, map_h, map_w,
    K: tl.constexpr, WINDOW: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, PW: tl.constexpr,
    MASK: tl.constexpr, CONTENT: tl.constexpr, RELATIVE: tl.constexpr, REPAIR: tl.constexpr,
):  # fmt: skip
    """A chunk of the patch of keys: key, value [P, DP], logits [M, P]. REPAIR: see `load_patch`."""
    near = tl.arange(0, ROWS * PW)
    near_row, near_col = chunk * ROWS + near // PW, near % PW
    v = load_patch(value, top, left, near_row, near_col, H, W, map_h, map_w, MASK, D, DP, REPAIR)
    k = v
    if CONTENT:
        k = load_patch(key, top, left, near_row, near_col, H, W, map_h, map_w, MASK, D, DP, REPAIR)
    place = chunk * ROWS + tl.arange(0, ROWS)[None, :]
    by_row = spread(by_offset, shift_row + place, takes_part(top, place, H, MASK), 0, K, WINDOW, RELATIVE)  # [M, ROWS]
    return k, v, pair_logits(q, k, by_row, by_col, CONTENT)


@triton.jit
def hold_lost_keys(
    key, value, shift_row, offset_col, counted, top, left, H, W, map_h, map_w,
    K: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, HEIGHT: tl.constexpr, PW: tl.constexpr,
    MASK: tl.constexpr, CONTENT: tl.constexpr,
):  # fmt: skip
    """Which windows hold NaN or infinity in key or value, 0 or 1: [M]. A row of the patch of HEIGHT at a time."""
    near_col = tl.arange(0, PW)
    in_cols = (offset_col >= 0) & (offset_col < K) & counted  # [M, PW]
    found = tl.zeros([offset_col.shape[0]], tl.int32)
    for near_row in tl.range(HEIGHT):
        row = near_row + 0 * near_col
        lost = lost_pixels(load_patch(value, top, left, row, near_col, H, W, map_h, map_w, MASK, D, DP, False))  # [PW]
        if CONTENT:
            lost |= lost_pixels(load_patch(key, top, left, row, near_col, H, W, map_h, map_w, MASK, D, DP, False))
        offset = shift_row + near_row
        found |= hold((offset >= 0) & (offset < K) & takes_part(top, near_row, H, MASK), in_cols, lost)
    return found
