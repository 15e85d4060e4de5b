"""Backend "tiled": local attention by tiles of the map, in plain PyTorch: any device, any floating dtype, no compiler.

The map is cut into tiles of 8 x 8 queries. A tile's windows lie in one patch, the tile with its halo, so its logits are
one product (queries of the tile) x (keys of the patch), three in four of them outside the windows, and still far
cheaper than K * K copies of the keys. Tiles are taken in chunks that fit a cache and computed again in backward, so
nothing larger than the inputs is kept and nothing larger than a chunk is made: memory is linear in H * W * C.

Relative logits and masks are separable: q.r = R[key row - query row] + C[key column - query column], K + K numbers a
pixel, and a pair that a row or a column excludes gets MASKED there.

Where inputs are not finite, or so large that logits could reach MASKED, every product leaves out the pairs outside a
window (0 * inf is NaN): slow, and NaN and inf come out where the definition has them. On CUDA, where inspecting the
numbers would wait for the GPU, they make their whole tile NaN instead.

Shapes: B batch, N heads, D head width, H x W map, K window side; G = part of the B * N maps, T tiles of a chunk, Q
queries of a tile, P keys of a patch. Source: Ramachandran et al. 2019, equation 3.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sasa.kernels.interface import AttentionOptions, CallKind, Gradients, Targets, accumulate_dtype, deliver
from sasa.kernels.reference import reach

MASKED = -1e30  # not -inf: a row of a ragged tile may have no key at all, and its softmax must not be NaN
LIMIT = 1e29  # of the products' magnitude: above it MASKED would not mask
TILE, TILE_DIVIDING, WHOLE = 8, 7, 15  # pixels: side of a tile; where 7 divides and 8 does not; up to 15: one tile
CHUNK = 1 << 19  # logits of a chunk, 2 MiB in fp32: measured on a CPU, the best of 2^17 to 2^22
CHUNK_GPU = 1 << 25  # there a chunk must fill the machine


def unusable() -> str | None:
    """Why this backend cannot run here; None: it runs everywhere."""
    return None


def unsupported(kind: CallKind) -> str | None:
    """Why this backend cannot take this call; None: it takes every call."""
    return None


class Axis(NamedTuple):
    """How one axis of the map is cut. Patch t holds keys t * tile - back + first, and `span` of them."""

    length: int  # of the map
    kernel_size: int
    tile: int
    count: int  # of tiles; the last may be ragged
    first: int
    span: int

    @property
    def padding(self) -> tuple[int, int]:
        """Zeros before and after the map that make every patch whole."""
        if self.span == self.length and self.count == 1:
            return 0, 0
        back, ahead = reach(self.kernel_size)
        return back, self.count * self.tile - self.length + ahead

    def mask(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """(count, span): MASKED on the keys of each patch that are outside the map, 0 on others."""
        tiles = torch.arange(self.count, device=device)[:, None] * self.tile
        keys = tiles + torch.arange(self.span, device=device) + self.first - reach(self.kernel_size)[0]
        outside = (keys < 0) | (keys >= self.length)
        return torch.zeros(keys.shape, dtype=dtype, device=device).masked_fill(outside, MASKED)

    def pairs(self, device: torch.device) -> Tensor:
        """(count, tile, span): the query is on the map, and the key in its window."""
        place = torch.arange(self.tile, device=device)[:, None]
        offset = torch.arange(self.span, device=device) + self.first - place  # (tile, span), index in the window
        on_map = torch.arange(self.count, device=device)[:, None, None] * self.tile + place < self.length
        return (offset >= 0) & (offset < self.kernel_size) & on_map


def cut(length: int, kernel_size: int, halo: bool) -> Axis:
    """`halo`: keys outside the map count too. Otherwise a single tile needs no other keys than its own."""
    if length <= WHOLE:
        tile = max(length, 1)
    else:
        tile = TILE_DIVIDING if length % TILE and length % TILE_DIVIDING == 0 else TILE
    count = -(-length // tile)
    if count == 1 and not halo:
        return Axis(length, kernel_size, tile, 1, reach(kernel_size)[0], tile)
    return Axis(length, kernel_size, tile, count, 0, tile + kernel_size - 1)


class Tiling(NamedTuple):
    """How a call is cut, and what is the same in all of its chunks."""

    rows: Axis
    cols: Axis
    row_mask: Tensor | None  # (rows.count, 1, 1, 1, span): MASKED on keys outside the map, 0 on others
    col_mask: Tensor | None  # (cols.count, 1, 1, span)
    # Where pairs must be cut out, else None; (rows.count, cols.count, Q, P):
    pairs: Tensor | None  # the query is on the map and the key in its window
    visible: Tensor | None  # and, with border="mask", the key is on the map
    group: int  # maps of a chunk
    band: int  # tile rows of a chunk; below rows.count only where group is 1

    def chunks(self, maps: int) -> Iterator[slice]:
        """Which of the `maps` each chunk takes."""
        for start in range(0, maps, self.group):
            yield slice(start, min(start + self.group, maps))

    def bands(self) -> Iterator[slice]:
        """Which rows of tiles each chunk of a map takes."""
        for start in range(0, self.rows.count, self.band):
            yield slice(start, min(start + self.band, self.rows.count))


def both(by_row: Tensor, by_col: Tensor) -> Tensor:
    """(rows.count, tile, span) and (cols.count, tile, span) -> (rows.count, cols.count, Q, P)."""
    pairs = by_row[:, None, :, None, :, None] & by_col[None, :, None, :, None, :]
    return pairs.flatten(4, 5).flatten(2, 3)


def make_tiling(query: Tensor, kernel_size: int, border: str, tame: bool) -> Tiling:
    """How a call with this query (B, N, D, H, W) is cut; without `tame`, pairs outside a window are cut out."""
    halo = border == "zero" or not tame
    rows, cols = (cut(length, kernel_size, halo) for length in query.shape[-2:])
    row_mask, col_mask = (
        axis.mask(accumulate_dtype(query.dtype), query.device) if border == "mask" and any(axis.padding) else None
        for axis in (rows, cols)
    )
    pairs = visible = None
    if not tame:
        by_row, by_col = rows.pairs(query.device), cols.pairs(query.device)
        pairs = both(by_row, by_col)
        visible = pairs
        if row_mask is not None:
            visible = both(by_row & (row_mask == 0)[:, None], by_col & (col_mask == 0)[:, None])
    row_mask = None if row_mask is None else row_mask[:, None, None, None]
    col_mask = None if col_mask is None else col_mask[:, None, None]

    logits = rows.tile * cols.tile * rows.span * cols.span * cols.count  # of one row of tiles
    room = CHUNK if query.device.type == "cpu" else CHUNK_GPU
    if not tame:
        room //= query.shape[2]  # its products are spelled out
    group = max(1, room // (logits * rows.count))
    band = rows.count if logits * rows.count <= room else max(1, room // logits)
    return Tiling(rows, cols, row_mask, col_mask, pairs, visible, group, band)


def is_tame(
    query: Tensor,
    key: Tensor | None,
    value: Tensor,
    rel_row: Tensor | None,
    rel_col: Tensor | None,
    scale: float,
    grad_out: Tensor | None = None,
) -> bool:
    """All finite, and products so small that masking by a sum is exact."""

    def largest(*tensors: Tensor | None) -> Tensor:
        low_high = [x.detach().aminmax() for x in tensors if x is not None]
        return sum(torch.maximum(-low, high).to(accumulate_dtype(low.dtype)) for low, high in low_high)

    if query.numel() == 0 or query.device.type == "cuda":  # there the answer would keep the host waiting
        return True
    bound = largest(query) * (largest(key, rel_row, rel_col) * abs(scale)) + largest(value)
    if grad_out is not None:
        bound = bound + largest(grad_out) * (largest(value) + 1)
    return bool(bound * query.shape[2] < LIMIT)  # NaN compares false, and so does an overflow


# Layout --------------------------------------------------------------------------------------------------------------


def to_tiles(x: Tensor, tiling: Tiling) -> Tensor:
    """(G, C, rows, W) -> (T, C, Q), whole rows of tiles."""
    rows, cols = tiling.rows, tiling.cols
    x = x.unflatten(3, (cols.count, cols.tile)).unflatten(2, (-1, rows.tile))  # (G, C, band, tile, count, tile)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(-1, x.shape[1], rows.tile * cols.tile)


def from_tiles(x: Tensor, maps: int, tiling: Tiling) -> Tensor:
    """The inverse: (T, C, Q) -> (G, C, rows, W)."""
    rows, cols = tiling.rows, tiling.cols
    x = x.view(maps, -1, cols.count, x.shape[1], rows.tile, cols.tile)
    return x.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def pad_queries(x: Tensor, tiling: Tiling, dtype: torch.dtype) -> Tensor:
    """Zeros after the map up to whole tiles: (G, C, H, W) -> (G, C, rows.count * tile, cols.count * tile)."""
    rows, cols = tiling.rows, tiling.cols
    right, below = cols.count * cols.tile - cols.length, rows.count * rows.tile - rows.length
    return F.pad(x.to(dtype), (0, right, 0, below)) if right or below else x.to(dtype)


def pad_keys(x: Tensor, tiling: Tiling, dtype: torch.dtype) -> Tensor:
    """Zeros around the map that make every patch whole: (G, C, H, W) -> (G, C, ..)."""
    padding = (*tiling.cols.padding, *tiling.rows.padding)
    return F.pad(x.to(dtype), padding) if any(padding) else x.to(dtype)


def patches(x: Tensor, band: slice, tiling: Tiling) -> Tensor:
    """Each tile's keys: padded maps (G, C, ..) -> (T, C, P)."""
    rows, cols = tiling.rows, tiling.cols
    x = x[:, :, band.start * rows.tile : (band.stop - 1) * rows.tile + rows.span]
    x = x.unfold(2, rows.span, rows.tile).unfold(3, cols.span, cols.tile)  # (G, C, band, count, span, span)
    return x.permute(0, 2, 3, 1, 4, 5).reshape(-1, x.shape[1], rows.span * cols.span)


def add_patches(total: Tensor, x: Tensor, band: slice, tiling: Tiling) -> None:
    """The transpose of `patches`: adds (T, C, P) onto padded maps (G, C, ..)."""
    rows, cols = tiling.rows, tiling.cols
    maps, channels = total.shape[:2]
    total = total[:, :, band.start * rows.tile : (band.stop - 1) * rows.tile + rows.span]
    x = x.view(maps, -1, cols.count, channels, rows.span, cols.span).permute(0, 3, 1, 2, 4, 5)
    # Patches overlap their neighbours: those that are `apart` tiles from each other do not, and are added in one go.
    apart_rows, apart_cols = -(-rows.span // rows.tile), -(-cols.span // cols.tile)
    for i in range(min(apart_rows, x.shape[2])):
        for j in range(min(apart_cols, x.shape[3])):
            part = x[:, :, i::apart_rows, j::apart_cols]
            target = total[:, :, i * rows.tile :, j * cols.tile :]
            target = target.unfold(2, rows.span, apart_rows * rows.tile).unfold(3, cols.span, apart_cols * cols.tile)
            target[:, :, : part.shape[2], : part.shape[3]].add_(part)


def offsets_to_keys(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """A number per offset in the window -> per key of the patch, MASKED outside the window: (.., K) -> (.., span).

    `dim`: the axis of x that runs over the tile. A view of one padded copy: the next query starts one key later.
    """
    x = F.pad(x, (axis.tile - 1, axis.tile - 1), value=MASKED).contiguous()
    strides = list(x.stride())
    strides[dim] -= axis.tile > 1  # the stride of a single query means nothing
    return x.as_strided((*x.shape[:-1], axis.span), strides, x.storage_offset() + axis.tile - 1 + axis.first)


def keys_to_offsets(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """The transpose of `offsets_to_keys`, without what is outside the windows: (.., span) -> (.., K)."""
    last = axis.kernel_size + axis.tile - 1 - axis.first
    x = F.pad(x, (axis.first, max(0, last - axis.span))).contiguous()
    strides = list(x.stride())
    strides[dim] += 1
    return x.as_strided((*x.shape[:-1], axis.kernel_size), strides, x.storage_offset())


# Mathematics ---------------------------------------------------------------------------------------------------------


def product(a: Tensor, b: Tensor, pairs: Tensor | None) -> Tensor:
    """a (T, C, I) x b (T, I, J) -> (T, C, J); where given, of pairs (tiles, I, J) only those that are True."""
    if pairs is None:
        return torch.bmm(a, b)
    terms = (a[..., None] * b[:, None]).unflatten(0, (-1, pairs.shape[0]))  # (G, tiles, C, I, J)
    return terms.masked_fill_(~pairs[:, None], 0).sum(-2).flatten(0, 1)


def relative_logits(query: Tensor, relative: tuple[Tensor, Tensor] | None, tiling: Tiling) -> tuple[Tensor, Tensor]:
    """Row and column logits of each query: (G, D, rows, W) -> 2 x (G, tiles, tiles, tile, tile, K)."""
    rows, cols = tiling.rows, tiling.cols
    shape = (query.shape[0], query.shape[2] // rows.tile, rows.tile, cols.count, cols.tile, rows.kernel_size)
    if relative is None:
        zeros = query.new_zeros(()).expand(shape).transpose(2, 3)
        return zeros, zeros
    row_half, col_half = query.flatten(2).transpose(1, 2).chunk(2, 2)  # (G, pixels, D/2)
    by_row, by_col = torch.bmm(row_half, relative[0]), torch.bmm(col_half, relative[1])  # (G, pixels, K)
    return by_row.view(shape).transpose(2, 3), by_col.view(shape).transpose(2, 3)


def logits(
    query: Tensor,
    tiles: Tensor,
    keys: Tensor | None,
    relative: tuple[Tensor, Tensor] | None,
    band: slice,
    tiling: Tiling,
) -> Tensor:
    """Masked logits of a chunk: query (G, D, rows, W), the same as tiles (T, D, Q), keys (T, D, P) -> (T, Q, P)."""
    rows, cols = tiling.rows, tiling.cols
    by_row, by_col = relative_logits(query, relative, tiling)
    by_row, by_col = (
        offsets_to_keys(by_row, rows, 3),
        offsets_to_keys(by_col, cols, 4),
    )  # (G, tiles, tiles, tile, tile, span)
    if tiling.row_mask is not None:
        by_row = by_row + tiling.row_mask[band]
    if tiling.col_mask is not None:
        by_col = by_col + tiling.col_mask
    total = by_row[..., :, None] + by_col[..., None, :]
    total = total.view(-1, rows.tile * cols.tile, rows.span * cols.span)  # (T, Q, P)
    if keys is not None:
        total.baddbmm_(tiles.transpose(1, 2), keys)
    if tiling.visible is not None:
        visible = tiling.visible[band].flatten(0, 1)  # (tiles, Q, P)
        total = total.unflatten(0, (-1, visible.shape[0])).masked_fill(~visible, float("-inf")).flatten(0, 1)
    return total


def softmax(scores: Tensor, pairs: Tensor | None) -> Tensor:
    """Over the keys of a patch: (T, Q, P) -> (T, Q, P); 0 where `pairs` is False."""
    attn = scores.softmax(-1)
    if pairs is None:
        return attn
    return attn.unflatten(0, (-1, pairs.shape[0])).masked_fill_(~pairs, 0).flatten(0, 1)


def softmax_backward(grad: Tensor, attn: Tensor, pairs: Tensor | None) -> Tensor:
    """Gradient of the logits from that of `attn`: (T, Q, P) -> (T, Q, P)."""
    if pairs is not None:
        grad = grad.unflatten(0, (-1, pairs.shape[0])).masked_fill(~pairs, 0).flatten(0, 1)
    return torch.ops.aten._softmax_backward_data(grad, attn, -1, attn.dtype)


def embeddings_of(
    relative: tuple[Tensor, Tensor] | None, maps: slice, dtype: torch.dtype
) -> tuple[Tensor, Tensor] | None:
    """Each map's own embeddings: 2 x (N, D/2, K) -> 2 x (G, D/2, K)."""
    if relative[0] is None:
        return None
    heads = torch.arange(maps.start, maps.stop, device=relative[0].device) % relative[0].shape[0]
    return tuple(x.to(dtype)[heads] for x in relative)


def forward(
    query: Tensor,
    key: Tensor | None,
    value: Tensor,
    rel_row: Tensor | None,
    rel_col: Tensor | None,
    options: AttentionOptions | int,
    border: str = "mask",
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """See `interface.Backend.forward`. Called by itself, it takes kernel_size, border and scale one by one too."""
    kernel_size, border, scale = (options, border, scale) if isinstance(options, int) else options
    tiling = make_tiling(query, kernel_size, border, is_tame(query, key, value, rel_row, rel_col, scale))
    acc = accumulate_dtype(query.dtype)
    q, k, v = (None if x is None else x.flatten(0, 1) for x in (query, key, value))  # (B * N, D, H, W)
    out = query.new_empty(q.shape)
    lse = query.new_empty((q.shape[0], 1, *q.shape[2:]), dtype=acc)
    for maps in tiling.chunks(q.shape[0]):
        relative = embeddings_of((rel_row, rel_col), maps, acc)
        queries = pad_queries(q[maps], tiling, acc) * scale
        keys = None if k is None else pad_keys(k[maps], tiling, acc)
        values = pad_keys(v[maps], tiling, acc)
        for band in tiling.bands():
            lines = slice(band.start * tiling.rows.tile, band.stop * tiling.rows.tile)
            pairs = None if tiling.pairs is None else tiling.pairs[band].flatten(0, 1)
            part = queries[:, :, lines]
            near = None if keys is None else patches(keys, band, tiling)  # (T, D, P)
            scores = logits(part, to_tiles(part, tiling), near, relative, band, tiling)
            top = scores.amax(-1)  # (T, Q)
            attn = softmax(scores, pairs)
            # The largest weight is exp(top - lse); a top of inf or -inf is its own lse.
            total = torch.where(top.isinf(), top, top - attn.amax(-1).log())
            mixed = product(patches(values, band, tiling), attn.transpose(1, 2), _turned(pairs))  # (T, D, Q)
            _store(out[maps, :, lines], mixed, tiling)
            _store(lse[maps, :, lines], total[:, None], tiling)
    return out.unflatten(0, query.shape[:2]), lse[:, 0].unflatten(0, query.shape[:2])


def _turned(pairs: Tensor | None) -> Tensor | None:
    return None if pairs is None else pairs.transpose(1, 2)


def _store(target: Tensor, tiles: Tensor, tiling: Tiling) -> None:
    """Whole tiles (T, C, Q) onto rows of the map (G, C, rows, W), without what is beyond it."""
    target.copy_(from_tiles(tiles, target.shape[0], tiling)[:, :, : target.shape[2], : target.shape[3]])


def backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor | None,
    value: Tensor,
    rel_row: Tensor | None,
    rel_col: Tensor | None,
    out: Tensor,
    lse: Tensor,
    options: AttentionOptions,
    into: Targets | None = None,
) -> Gradients:
    """See `interface.Backend.backward`; `out` and `lse` are not needed."""
    kernel_size, border, scale = options
    tiling = make_tiling(query, kernel_size, border, is_tame(query, key, value, rel_row, rel_col, scale, grad_out))
    rows, cols, acc = tiling.rows, tiling.cols, accumulate_dtype(query.dtype)
    inputs = (grad_out, query, key, value)
    g, q, k, v = (None if x is None else x.flatten(0, 1) for x in inputs)  # (B * N, D, H, W)
    grad_query, grad_value = query.new_empty(q.shape), query.new_empty(q.shape)
    grad_key = None if k is None else query.new_empty(q.shape)
    grad_relative = None
    if rel_row is not None:
        grad_relative = query.new_zeros((2, q.shape[0], *rel_row.shape[1:]), dtype=acc)  # a map each, then summed
    for maps in tiling.chunks(q.shape[0]):
        relative = embeddings_of((rel_row, rel_col), maps, acc)
        queries, grads = pad_queries(q[maps], tiling, acc) * scale, pad_queries(g[maps], tiling, acc)
        keys = None if k is None else pad_keys(k[maps], tiling, acc)
        values = pad_keys(v[maps], tiling, acc)
        grad_keys, grad_values = None if k is None else torch.zeros_like(keys), torch.zeros_like(values)
        for band in tiling.bands():
            lines = slice(band.start * rows.tile, band.stop * rows.tile)
            pairs = None if tiling.pairs is None else tiling.pairs[band].flatten(0, 1)
            part = queries[:, :, lines]
            tiles, grad_tiles = to_tiles(part, tiling), to_tiles(grads[:, :, lines], tiling)  # (T, D, Q)
            near = None if keys is None else patches(keys, band, tiling)  # (T, D, P)
            attn = softmax(logits(part, tiles, near, relative, band, tiling), pairs)  # (T, Q, P)
            add_patches(grad_values, product(grad_tiles, attn, pairs), band, tiling)
            grad = torch.bmm(grad_tiles.transpose(1, 2), patches(values, band, tiling))
            grad = softmax_backward(grad, attn, pairs)  # of the logits
            grad_part = torch.zeros_like(part)
            if keys is not None:
                add_patches(grad_keys, product(tiles, grad, pairs), band, tiling)
                grad_part = from_tiles(product(near, grad.transpose(1, 2), _turned(pairs)), part.shape[0], tiling)
            if relative is not None:
                _relative_backward(grad, part, relative, grad_part, grad_relative[:, maps], tiling)
            height = grad_query[maps, :, lines].shape[2]
            grad_query[maps, :, lines] = grad_part[:, :, :height, : cols.length] * scale
        for target, total in ((grad_key, grad_keys), (grad_value, grad_values)):
            if target is not None:
                left, above = cols.padding[0], rows.padding[0]
                target[maps] = total[:, :, above : above + rows.length, left : left + cols.length]
    shape = query.shape[:2]
    if rel_row is not None:
        grad_row, grad_col = (x.unflatten(0, shape).sum(0).to(rel_row.dtype) for x in grad_relative)
    grads = (grad_query, None if key is None else grad_key, grad_value)
    grads = tuple(None if x is None else x.unflatten(0, shape) for x in grads)
    return *deliver(grads, into), None if rel_row is None else grad_row, None if rel_col is None else grad_col


def _relative_backward(grad, query, relative, grad_query, grad_relative, tiling: Tiling) -> None:
    """Adds the embeddings' part of `grad`, the gradient of the logits (T, Q, P), to grad_query and grad_relative."""
    rows, cols = tiling.rows, tiling.cols
    count = query.shape[0]
    grad = grad.view(count, -1, cols.count, rows.tile, cols.tile, rows.span, cols.span)
    by_row, by_col = (
        keys_to_offsets(grad.sum(-1), rows, 3),
        keys_to_offsets(grad.sum(-2), cols, 4),
    )  # (G, tiles, tiles, tile, tile, K)
    halves = zip(
        query.flatten(2).chunk(2, 1), grad_query.chunk(2, 1), relative, (by_row, by_col), grad_relative, strict=True
    )
    for half, grad_half, table, by_offset, grad_table in halves:
        by_offset = by_offset.transpose(2, 3).reshape(count, -1, rows.kernel_size)  # (G, pixels, K)
        grad_half += torch.bmm(table, by_offset.transpose(1, 2)).view(grad_half.shape)
        grad_table += torch.bmm(half, by_offset)
