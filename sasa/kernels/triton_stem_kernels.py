"""The device side of the attention stem on CUDA: forward and backward, blocks (pooled or not) and sliding windows.

A program serves T units of one image: blocks of S x S pixels, or single pixels with the window around each. Lanes run
over the units. For each query of a unit (one of a block's P positions; the pixel itself) the logits with the P keys are
a form of the 3 image channels, and the output is one product of the head's value matrices with the P keys' pixels,
weighted by attention and mixture: [D, M * C] x [M * C, T]. So nothing of head width is kept a window's position, and
backward computes the softmax again: only the image and the weights are kept between the passes.

POOLED: of a block only one value of each channel leaves, that whose product with the channel's sign is the largest (the
first of equals), with its place, the mean and the sum of squared deviations from it (both of this program's units,
combined on the host). Gradients of the weights are one partial sum a program; their sum has a fixed order. No atomics.

Shapes: B batch, C = 3 image channels, H x W image, N heads, D head width, M mixtures, P = S * S positions of a window;
padded to powers of two of at least 16: DP, MC (of M * C) and PP. In brackets the shapes of tensors. MIX [C, MC, PP]
holds mixture[p, m] at row m * C + c of its c-th matrix, zeros in the rows of other channels.
"""

import triton
import triton.language as tl

MASKED = tl.constexpr(-1e30)
LOG2E = tl.constexpr(1.4426950408889634)

SIZES = ["H", "W", "units_h", "units_w", "tiles"]


@triton.jit
def _dot(a, b):
    """[I, J] x [J, L] in fp32, no TF32."""
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _pixels(image, row, col, H, W, x_c, x_h, x_w, wanted):
    """The three channels at row, col, 0 outside the image; -> and where that is inside."""
    inside = (row >= 0) & (row < H) & (col >= 0) & (col < W) & wanted
    at = image + row * x_h + col * x_w
    red = tl.load(at, mask=inside, other=0.0)
    green = tl.load(at + x_c, mask=inside, other=0.0)
    blue = tl.load(at + 2 * x_c, mask=inside, other=0.0)
    return red, green, blue, inside


@triton.jit
def _attention(a0, a1, a2, x0, x1, x2, counted):
    """Softmax over the keys of the logits sum_c a_c x_c: a_c [T], x_c [PP, T] -> [PP, T]."""
    logits = (a0[None, :] * x0 + a1[None, :] * x1 + a2[None, :] * x2) * LOG2E
    logits = tl.where(counted, logits, MASKED)
    weights = tl.exp2(logits - tl.max(logits, 0)[None, :])
    weights = tl.where(counted, weights, 0.0)
    return weights / tl.maximum(tl.sum(weights, 0), 1e-30)[None, :]


@triton.jit
def _form(forms, q0, q1, q2):
    """a_d = sum_c x_c form[c, d] of a head's 3 x 3 form."""
    a0 = q0 * tl.load(forms) + q1 * tl.load(forms + 3) + q2 * tl.load(forms + 6)
    a1 = q0 * tl.load(forms + 1) + q1 * tl.load(forms + 4) + q2 * tl.load(forms + 7)
    a2 = q0 * tl.load(forms + 2) + q1 * tl.load(forms + 5) + q2 * tl.load(forms + 8)
    return a0, a1, a2


@triton.jit
def _weight(weight, n, N: tl.constexpr, D: tl.constexpr, M: tl.constexpr, DP: tl.constexpr, MC: tl.constexpr):
    """A head's value matrices (M, N * D, 3) as [DP, MC], zeros beyond D and M * 3."""
    channel, mixed = tl.arange(0, DP)[:, None], tl.arange(0, MC)[None, :]
    at = (mixed // 3 * (N * D) + n * D + channel) * 3 + mixed % 3
    return tl.load(weight + at, mask=(channel < D) & (mixed < 3 * M), other=0.0)


@triton.jit
def _mix(mix, c, MC: tl.constexpr, PP: tl.constexpr):
    return tl.load(mix + (c * MC + tl.arange(0, MC)[:, None]) * PP + tl.arange(0, PP)[None, :])


@triton.jit(do_not_specialize=SIZES)
def stem_forward_kernel(
    image, forms, mix, weight, signs, out, place, moments, x_b, x_c, x_h, x_w, out_b, out_c, out_h, out_w,
    H, W, units_h, units_w, tiles,
    N: tl.constexpr, D: tl.constexpr, M: tl.constexpr, S: tl.constexpr, T: tl.constexpr,
    DP: tl.constexpr, MC: tl.constexpr, PP: tl.constexpr,
    SLIDING: tl.constexpr, MASK: tl.constexpr, POOLED: tl.constexpr,
):  # fmt: skip
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    unit = tl.program_id(0) % tiles * T + tl.arange(0, T)  # [T]
    is_unit = unit < units_h * units_w
    row, col = unit // units_w, unit % units_w
    back: tl.constexpr = (S - 1) // 2 if SLIDING else 0
    step: tl.constexpr = 1 if SLIDING else S
    key = tl.arange(0, PP)[:, None]
    image += batch * x_b
    x0, x1, x2, inside = _pixels(
        image, row[None, :] * step - back + key // S, col[None, :] * step - back + key % S, H, W, x_c, x_h, x_w,
        (key < S * S) & is_unit[None, :],
    )  # fmt: skip
    counted = inside if MASK else (key < S * S) & is_unit[None, :]
    mix0, mix1, mix2 = _mix(mix, 0, MC, PP), _mix(mix, 1, MC, PP), _mix(mix, 2, MC, PP)
    channel = tl.arange(0, DP)[:, None]
    out += batch * out_b
    if POOLED:
        place += batch * out_b
    for n in tl.range(N):
        values = _weight(weight, n, N, D, M, DP, MC)
        if POOLED:
            sign = tl.load(signs + n * D + channel, mask=channel < D, other=0.0)  # [DP, 1]
            chosen = tl.zeros([DP, T], tl.float32)
            at_place = tl.zeros([DP, T], tl.float32)
            origin = tl.zeros([DP, T], tl.float32)
            total = tl.zeros([DP, T], tl.float32)
            square = tl.zeros([DP, T], tl.float32)
            count = tl.zeros([T], tl.float32)
        for q in tl.range(1 if SLIDING else S * S):
            query_row, query_col = row * step + q // S, col * step + q % S
            q0, q1, q2, real = _pixels(image, query_row, query_col, H, W, x_c, x_h, x_w, is_unit)
            a0, a1, a2 = _form(forms + n * 9, q0, q1, q2)
            attn = _attention(a0, a1, a2, x0, x1, x2, counted)  # [PP, T]
            mixed = _dot(mix0, attn * x0) + _dot(mix1, attn * x1) + _dot(mix2, attn * x2)  # [MC, T]
            value = _dot(values, mixed)  # [DP, T]
            if POOLED:
                ranked = value * sign
                is_larger = (ranked > chosen * sign) | (ranked != ranked) | (q == 0)
                is_larger = real[None, :] & is_larger  # a block's first pixel is always real
                chosen = tl.where(is_larger, value, chosen)
                at_place = tl.where(is_larger, q, at_place)
                origin = tl.where(q == 0, value, origin)
                deviation = tl.where(real[None, :], value - origin, 0.0)
                total += deviation
                square += deviation * deviation
                count += real.to(tl.float32)
            else:
                at = query_row * out_h + query_col * out_w
                stored = real[None, :] & (channel < D)
                tl.store(out + (n * D + channel) * out_c + at[None, :], value, mask=stored)
        if POOLED:
            stored = is_unit[None, :] & (channel < D)
            at = (n * D + channel) * out_c + (row * out_h + col * out_w)[None, :]
            tl.store(out + at, chosen, mask=stored)
            tl.store(place + at, at_place, mask=stored)
            # Mean and squared deviations: of each block about its first pixel, then of the blocks about their mean.
            share = tl.maximum(count, 1.0)[None, :]
            mean_of_block = origin + total / share
            pixels = tl.maximum(tl.sum(count, 0), 1.0)
            mean = tl.sum(mean_of_block * count[None, :], 1) / pixels  # [DP]
            off = mean_of_block - mean[:, None]
            squares = tl.sum(square - total * total / share + off * off * count[None, :], 1)
            into = moments + tl.program_id(0).to(tl.int64) * (2 * N * D) + n * D + tl.arange(0, DP)
            tl.store(into, mean, mask=tl.arange(0, DP) < D)
            tl.store(into + N * D, squares, mask=tl.arange(0, DP) < D)


@triton.jit(do_not_specialize=SIZES)
def stem_backward_kernel(
    grad_out, place, slopes, image, forms, mix, weight, grad_image, grad_forms, grad_mix, grad_weight,
    g_b, g_c, g_h, g_w, x_b, x_c, x_h, x_w, H, W, units_h, units_w, tiles,
    N: tl.constexpr, D: tl.constexpr, M: tl.constexpr, S: tl.constexpr, T: tl.constexpr,
    DP: tl.constexpr, MC: tl.constexpr, PP: tl.constexpr,
    SLIDING: tl.constexpr, MASK: tl.constexpr, POOLED: tl.constexpr, IMAGE: tl.constexpr,
):  # fmt: skip
    """grad_image (B, units_h, units_w, 3, S * S): each unit's share of its window's pixels, added up on the host."""
    pid = tl.program_id(0).to(tl.int64)
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    unit = tl.program_id(0) % tiles * T + tl.arange(0, T)  # [T]
    is_unit = unit < units_h * units_w
    row, col = unit // units_w, unit % units_w
    back: tl.constexpr = (S - 1) // 2 if SLIDING else 0
    step: tl.constexpr = 1 if SLIDING else S
    key = tl.arange(0, PP)[:, None]
    image += batch * x_b
    x0, x1, x2, inside = _pixels(
        image, row[None, :] * step - back + key // S, col[None, :] * step - back + key % S, H, W, x_c, x_h, x_w,
        (key < S * S) & is_unit[None, :],
    )  # fmt: skip
    counted = inside if MASK else (key < S * S) & is_unit[None, :]
    mix0, mix1, mix2 = _mix(mix, 0, MC, PP), _mix(mix, 1, MC, PP), _mix(mix, 2, MC, PP)
    channel = tl.arange(0, DP)
    grad_out += batch * g_b
    if POOLED:
        place += batch * g_b
    if IMAGE:
        grad_x0, grad_x1, grad_x2 = (
            tl.zeros([PP, T], tl.float32),
            tl.zeros([PP, T], tl.float32),
            tl.zeros([PP, T], tl.float32),
        )
    of_mix0 = tl.zeros([MC, PP], tl.float32)
    of_mix1 = tl.zeros([MC, PP], tl.float32)
    of_mix2 = tl.zeros([MC, PP], tl.float32)
    for n in tl.range(N):
        values = _weight(weight, n, N, D, M, DP, MC)
        of_values = tl.zeros([DP, MC], tl.float32)
        f00, f01, f02 = tl.zeros([T], tl.float32), tl.zeros([T], tl.float32), tl.zeros([T], tl.float32)
        f10, f11, f12 = tl.zeros([T], tl.float32), tl.zeros([T], tl.float32), tl.zeros([T], tl.float32)
        f20, f21, f22 = tl.zeros([T], tl.float32), tl.zeros([T], tl.float32), tl.zeros([T], tl.float32)
        for q in tl.range(1 if SLIDING else S * S):
            query_row, query_col = row * step + q // S, col * step + q % S
            q0, q1, q2, real = _pixels(image, query_row, query_col, H, W, x_c, x_h, x_w, is_unit)
            a0, a1, a2 = _form(forms + n * 9, q0, q1, q2)
            attn = _attention(a0, a1, a2, x0, x1, x2, counted)  # [PP, T]
            y0, y1, y2 = attn * x0, attn * x1, attn * x2
            mixed = _dot(mix0, y0) + _dot(mix1, y1) + _dot(mix2, y2)  # [MC, T]
            wanted = real[None, :] & (channel < D)[:, None]
            if POOLED:
                at = (n * D + channel)[:, None] * g_c + (row * g_h + col * g_w)[None, :]
                is_chosen = wanted & (tl.load(place + at, mask=wanted, other=-1.0) == q)
                flat = tl.load(slopes + n * D + channel, mask=channel < D, other=0.0)[:, None]
                rising = tl.load(slopes + (N + n) * D + channel, mask=channel < D, other=0.0)[:, None]
                g = tl.load(grad_out + at, mask=is_chosen, other=0.0)
                g += tl.where(wanted, flat + rising * _dot(values, mixed), 0.0)  # [DP, T]
            else:
                at = (n * D + channel)[:, None] * g_c + (query_row * g_h + query_col * g_w)[None, :]
                g = tl.load(grad_out + at, mask=wanted, other=0.0)
            of_values += _dot(g, tl.trans(mixed))
            grad_mixed = _dot(tl.trans(values), g)  # [MC, T]
            of_mix0 += _dot(grad_mixed, tl.trans(y0))
            of_mix1 += _dot(grad_mixed, tl.trans(y1))
            of_mix2 += _dot(grad_mixed, tl.trans(y2))
            z0 = _dot(tl.trans(mix0), grad_mixed)  # [PP, T], of attn * x_c
            z1 = _dot(tl.trans(mix1), grad_mixed)
            z2 = _dot(tl.trans(mix2), grad_mixed)
            of_attn = z0 * x0 + z1 * x1 + z2 * x2
            of_logits = attn * (of_attn - tl.sum(attn * of_attn, 0)[None, :])
            s0, s1, s2 = tl.sum(of_logits * x0, 0), tl.sum(of_logits * x1, 0), tl.sum(of_logits * x2, 0)  # [T]
            f00, f01, f02 = f00 + q0 * s0, f01 + q0 * s1, f02 + q0 * s2
            f10, f11, f12 = f10 + q1 * s0, f11 + q1 * s1, f12 + q1 * s2
            f20, f21, f22 = f20 + q2 * s0, f21 + q2 * s1, f22 + q2 * s2
            if IMAGE:  # by the values, by the keys, and by the query, which lies in its own window
                mine = (key == (back * S + back if SLIDING else q)) & real[None, :]
                b0, b1, b2 = _form_back(forms + n * 9, s0, s1, s2)
                grad_x0 += z0 * attn + of_logits * a0[None, :] + tl.where(mine, b0[None, :], 0.0)
                grad_x1 += z1 * attn + of_logits * a1[None, :] + tl.where(mine, b1[None, :], 0.0)
                grad_x2 += z2 * attn + of_logits * a2[None, :] + tl.where(mine, b2[None, :], 0.0)
        into = grad_forms + (pid * N + n) * 9
        tl.store(into, tl.sum(f00, 0))
        tl.store(into + 1, tl.sum(f01, 0))
        tl.store(into + 2, tl.sum(f02, 0))
        tl.store(into + 3, tl.sum(f10, 0))
        tl.store(into + 4, tl.sum(f11, 0))
        tl.store(into + 5, tl.sum(f12, 0))
        tl.store(into + 6, tl.sum(f20, 0))
        tl.store(into + 7, tl.sum(f21, 0))
        tl.store(into + 8, tl.sum(f22, 0))
        mixed_at = tl.arange(0, MC)[None, :]
        into = grad_weight + pid * (M * N * D * 3) + (mixed_at // 3 * (N * D) + n * D + channel[:, None]) * 3
        tl.store(into + mixed_at % 3, of_values, mask=(channel < D)[:, None] & (mixed_at < 3 * M))
    at = tl.arange(0, MC)[:, None] * PP + tl.arange(0, PP)[None, :]
    of_channel = tl.arange(0, MC)[:, None] % 3  # row m * 3 + c of the c-th matrix alone belongs to a mixture
    total = tl.where(of_channel == 0, of_mix0, tl.where(of_channel == 1, of_mix1, of_mix2))
    tl.store(grad_mix + pid * (MC * PP) + at, total)
    if IMAGE:
        stored = is_unit[None, :] & (key < S * S)
        into = grad_image + (batch * (units_h * units_w) + unit[None, :]) * (3 * S * S) + key
        tl.store(into, grad_x0, mask=stored)
        tl.store(into + S * S, grad_x1, mask=stored)
        tl.store(into + 2 * S * S, grad_x2, mask=stored)


@triton.jit
def _form_back(forms, s0, s1, s2):
    """sum_d form[c, d] s_d: the query's gradient by its logits."""
    b0 = s0 * tl.load(forms) + s1 * tl.load(forms + 1) + s2 * tl.load(forms + 2)
    b1 = s0 * tl.load(forms + 3) + s1 * tl.load(forms + 4) + s2 * tl.load(forms + 5)
    b2 = s0 * tl.load(forms + 6) + s1 * tl.load(forms + 7) + s2 * tl.load(forms + 8)
    return b0, b1, b2
