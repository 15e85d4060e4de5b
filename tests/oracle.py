"""The paper's equations as loops over images, heads, pixels and windows: what every kernel and layer is held against.

Written from the text of Ramachandran et al. 2019 and the ledger of `attention.py`, sharing no code with the product and
none of its tricks (no unfold, no einsum, no padding): a pixel's window is a list of keys. Slow, so for small maps; in
fp64, and autograd runs through the loops. `plain_local_attention`, at the end, is the one fast function: what
low-precision PyTorch would give, the yardstick of the half types.

Shapes: B batch, N heads, D head width, H x W map, K window side, S block side, M value matrices.
"""

import math

import torch

# ---- pieces --------------------------------------------------------------------------------------------------------


def dot(a, b):
    return (a * b).sum()


def pixels(x):
    """(C, H, W) -> list of rows of vectors (C,): x[y][x]. unbind, not indexing: its gradient costs less."""
    return [row.unbind(0) for row in x.permute(1, 2, 0).unbind(0)]


def matrix_of(weight):
    """The matrix (out, in) of a 1x1 convolution's weight (out, in, 1, 1)."""
    return weight[:, :, 0, 0]


def assemble(rows):
    """list of rows of vectors (C,) -> (C, H, W), the inverse of `pixels`."""
    return torch.stack([torch.stack(list(row)) for row in rows]).permute(2, 0, 1)


def attend(logits, values):
    """sum of softmax(logits) * values over one window, given as two lists."""
    weights = torch.softmax(torch.stack(logits), 0).unbind(0)
    return sum(w * v for w, v in zip(weights, values, strict=True))


def window_offsets(size):
    """(index in the window, offset from its pixel): an even window reaches one further ahead than back."""
    return [(i, i - (size - 1) // 2) for i in range(size)]


# ---- the function --------------------------------------------------------------------------------------------------


def local_attention(query, key, value, rel_row, rel_col, *, kernel_size, border="mask", scale=1.0):
    """(B, N, D, H, W), rel (N, D/2, K) -> (B, N, D, H, W): logits = scale * (q.k + q.r), r = concat(row, column)."""
    batch, heads, _, height, width = query.shape
    offsets = window_offsets(kernel_size)
    nothing = query.new_zeros(query.shape[2])
    images = []
    for b in range(batch):
        maps = []
        for n in range(heads):
            q, v = pixels(query[b, n]), pixels(value[b, n])
            k = None if key is None else pixels(key[b, n])
            if rel_row is not None:
                row_vectors, col_vectors = rel_row[n].unbind(1), rel_col[n].unbind(1)
                r = [[torch.cat((row_vectors[i], col_vectors[j])) for j, _ in offsets] for i, _ in offsets]
            out = []
            for y in range(height):
                out.append([])
                for x in range(width):
                    logits, values = [], []
                    for i, dy in offsets:
                        for j, dx in offsets:
                            inside = 0 <= y + dy < height and 0 <= x + dx < width
                            if not inside and border == "mask":
                                continue
                            logit = query.new_zeros(())
                            if k is not None and inside:
                                logit = logit + dot(q[y][x], k[y + dy][x + dx])
                            if rel_row is not None:
                                logit = logit + dot(q[y][x], r[i][j])
                            logits.append(scale * logit)
                            values.append(v[y + dy][x + dx] if inside else nothing)
                    out[-1].append(attend(logits, values))
            maps.append(assemble(out))
        images.append(torch.stack(maps))
    return torch.stack(images)


# ---- the layer -----------------------------------------------------------------------------------------------------


def project(x, weight, groups=1):
    """A 1x1 convolution without bias, pixel by pixel: (B, C_in, H, W) -> (B, C_out, H, W)."""
    parts = []
    for matrix, part in zip(matrix_of(weight).chunk(groups, 0), x.chunk(groups, 1), strict=True):
        parts.append(torch.stack([assemble([[matrix @ p for p in row] for row in pixels(image)]) for image in part]))
    return torch.cat(parts, 1)


def average_pool(x, stride):
    """stride x stride windows; the last one of a ragged map averages the pixels that it has."""
    height, width = x.shape[-2:]
    rows = []
    for y in range(0, height, stride):
        rows.append([x[..., y : y + stride, c : c + stride].mean((-2, -1)) for c in range(0, width, stride)])
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


def position_code(channels, height, width):
    """Sinusoids of Vaswani et al. 2017: first half of the channels for the row, second for the column, sines first."""
    count = channels // 4
    code = torch.zeros(channels, height, width, dtype=torch.float64)
    for y in range(height):
        for x in range(width):
            for half, place in ((0, y), (channels // 2, x)):
                for f in range(count):
                    angle = place / 10000 ** (f / count)
                    code[half + f, y, x] = math.sin(angle)
                    code[half + count + f, y, x] = math.cos(angle)
    return code


def layer(x, parameters, *, kernel_size, num_heads, stride=1, position="relative", content=True, border="mask",
          grouped=False, share_embeddings=False, scale=1.0):  # fmt: skip
    """`LocalAttention2d` from its parameters by name: (B, C_in, H, W) -> (B, C_out, ceil(H/stride), ceil(W/stride))."""
    if position == "absolute":
        x = x + position_code(x.shape[1], *x.shape[2:])
    groups = num_heads if grouped else 1

    def heads(name):
        return project(x, parameters[f"{name}.weight"], groups).unflatten(1, (num_heads, -1))

    rel_row = rel_col = None
    if position == "relative":
        rel_row, rel_col = parameters["rel_row"], parameters["rel_col"]
        if share_embeddings:
            rel_row, rel_col = (torch.cat([table] * num_heads) for table in (rel_row, rel_col))
    out = local_attention(
        heads("query"), heads("key") if content else None, heads("value"), rel_row, rel_col,
        kernel_size=kernel_size, border=border, scale=scale,
    ).flatten(1, 2)  # fmt: skip
    return average_pool(out, stride)


# ---- the stem ------------------------------------------------------------------------------------------------------


def mixture(emb_row, emb_col, emb_mix):
    """p[a][b][m] = softmax over m of (emb_row(a) + emb_col(b)) . emb_mix(m)."""
    size = emb_row.shape[1]
    return [
        [torch.softmax(torch.stack([dot(emb_row[:, a] + emb_col[:, b], nu) for nu in emb_mix]), 0) for b in range(size)]
        for a in range(size)
    ]


def convolve(x, weight):
    """A size-keeping convolution whose even window reaches one further ahead: (C_in, H, W) -> rows of vectors."""
    height, width = x.shape[-2:]
    grid, size = pixels(x), weight.shape[-1]
    rows = []
    for y in range(height):
        rows.append([])
        for c in range(width):
            total = x.new_zeros(weight.shape[0])
            for i, dy in window_offsets(size):
                for j, dx in window_offsets(size):
                    if 0 <= y + dy < height and 0 <= c + dx < width:
                        total = total + weight[:, :, i, j] @ grid[y + dy][c + dx]
            rows[-1].append(total)
    return rows


def stem(x, parameters, *, block_size=4, window="block", num_heads=4, num_mixtures=4, values="mixture", border="mask"):
    """`AttentionStem` from its parameters by name: (B, C_in, H, W) -> (B, C_out, H, W); softmax over q.k alone."""
    height, width = x.shape[-2:]
    w_query, w_key = matrix_of(parameters["query.weight"]), matrix_of(parameters["key.weight"])
    w_value = parameters["value.weight"]
    channels = w_query.shape[0]
    nothing = x.new_zeros(channels)
    if values == "mixture":
        p = mixture(parameters["emb_row"], parameters["emb_col"], parameters["emb_mix"])
        matrices = matrix_of(w_value).chunk(num_mixtures)
        mixed = [
            [sum(p[a][b][m] * matrices[m] for m in range(num_mixtures)) for b in range(block_size)]
            for a in range(block_size)
        ]
    images = []
    for image in x:
        grid = pixels(image)
        made = convolve(image, w_value) if values == "conv" else None
        rows = []
        for y in range(height):
            rows.append([])
            for c in range(width):
                query = (w_query @ grid[y][c]).chunk(num_heads)
                keys, vals = [], []
                for a in range(block_size):
                    for b in range(block_size):
                        if window == "block":
                            ky, kx = y - y % block_size + a, c - c % block_size + b
                        else:
                            ky, kx = y + a - (block_size - 1) // 2, c + b - (block_size - 1) // 2
                        inside = 0 <= ky < height and 0 <= kx < width
                        if not inside and border == "mask":
                            continue
                        keys.append((w_key @ grid[ky][kx] if inside else nothing).chunk(num_heads))
                        if not inside:
                            v = nothing
                        elif values == "conv":
                            v = made[ky][kx]
                        elif values == "plain":
                            v = matrix_of(w_value) @ grid[ky][kx]
                        else:
                            v = mixed[a][b] @ grid[ky][kx]
                        vals.append(v.chunk(num_heads))
                head_outputs = [
                    attend([dot(query[n], k[n]) for k in keys], [v[n] for v in vals]) for n in range(num_heads)
                ]
                rows[-1].append(torch.cat(head_outputs))
        images.append(assemble(rows))
    return torch.stack(images)


# ---- the yardstick of the half types -------------------------------------------------------------------------------


def plain_local_attention(query, key, value, rel_row, rel_col, *, kernel_size, border="mask", scale=1.0):
    """The same function with every intermediate in the inputs' own dtype, one shifted slice an offset; for autograd."""
    height, width = query.shape[-2:]
    back, half = (kernel_size - 1) // 2, query.shape[2] // 2
    pad = (back, kernel_size // 2) * 2
    keys = None if key is None else torch.nn.functional.pad(key, pad)
    values = torch.nn.functional.pad(value, pad)
    here = torch.nn.functional.pad(torch.ones(height, width, device=query.device), pad)
    logits, shifted = [], []
    for i in range(kernel_size):
        for j in range(kernel_size):
            window = (..., slice(i, i + height), slice(j, j + width))
            logit = torch.zeros_like(query[:, :, 0])
            if keys is not None:
                logit = logit + (query * keys[window]).sum(2)
            if rel_row is not None:
                logit = logit + (query[:, :, :half] * rel_row[:, :, i, None, None]).sum(2)
                logit = logit + (query[:, :, half:] * rel_col[:, :, j, None, None]).sum(2)
            logit = logit * scale
            logits.append(logit if border == "zero" else logit.masked_fill(here[window] == 0, float("-inf")))
            shifted.append(values[window])
    attn = torch.stack(logits).softmax(0)
    out = torch.zeros_like(value)
    for weight, v in zip(attn, shifted, strict=True):
        out = out + weight[:, :, None] * v
    return out


def assert_close(got, wanted, tolerance):
    """Within `tolerance` of the largest value, and of 1 where all values are smaller."""
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert got[name].shape == value.shape, name
        error = (got[name].double() - value).abs().max().item()
        assert error <= tolerance * max(1.0, value.abs().max().item()), f"{name}: off by {error}"
