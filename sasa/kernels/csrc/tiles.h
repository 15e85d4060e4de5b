// Forward and backward of one tile: ROWS query rows x one vector of lanes.

#pragma once

#include <cmath>

#include "pairs.h"

namespace {

struct Tiles : PairedRows {
    using PairedRows::PairedRows;

    void relative_logits(const Scratch& s) const {
        if (!has_rel) return;  // scratch is zero there
        const i64 half = D / 2;
        for (int part = 0; part < 2; ++part) {
            T* to = part ? s.col_logits : s.row_logits;
            for (int j0 = 0; j0 < K; j0 += score_width(ROWS)) {
                with_constant<score_width(ROWS)>(std::min(K - j0, score_width(ROWS)), [&](auto n) INLINE_LAMBDA {
                    V acc[ROWS][decltype(n)::value] = {};
                    P::multiply(acc, s.tile_query + part * half * ROWS * L, L, ROWS * L,
                             s.embedding + (part * half * K + j0) * L, L, i64(K) * L, half);
                    for (int r = 0; r < ROWS; ++r)
                        for (int j = 0; j < decltype(n)::value; ++j) S::store(to + (r * K + j0 + j) * L, acc[r][j]);
                });
            }
        }
    }

    // q.k + R + C into the tile, -inf where no key is.
    void scores(const Scratch& scratch, const Tile& t) const {
        const V lowest = S::fill(-std::numeric_limits<T>::infinity());
        each_block(t, [&](auto rows, auto width, int s, int first, int j0) INLINE_LAMBDA {
            constexpr int R = decltype(rows)::value, J = decltype(width)::value;
            V acc[R][J];
            const T *row = scratch.row_logits + (first * K + s - first) * L, *col = scratch.col_logits + (first * K + j0) * L;
            const i64 row_step = (K - 1) * L, col_step = K * L;
            for (int r = 0; r < R; ++r) {
                const V bias = S::load(row + r * row_step);
                for (int j = 0; j < J; ++j) acc[r][j] = bias + S::load(col + r * col_step + j * L);
            }
            if (has_key) P::multiply(acc, scratch.tile_query + first * L, L, ROWS * L, t.key[s] + j0 * G, G, pitch, D);
            if (t.edge)
                for (int j = 0; j < J; ++j)
                    for (int r = 0; r < R; ++r) acc[r][j] = S::pick(live[t.v * K + j0 + j], acc[r][j], lowest);
            T* to = scratch.tile + ((s * K + j0) * ROWS + first) * L;
            for (int r = 0; r < R; ++r)
                for (int j = 0; j < J; ++j) S::store(to + (j * ROWS + r) * L, acc[r][j]);
        });
    }

    void forward_tile(const Scratch& scratch, const Tile& t, T* out_rows, T* lse_rows) const {
        relative_logits(scratch);
        scores(scratch, t);
        V peak[ROWS], total[ROWS] = {}, inverse[ROWS];
        bool broken = false;
        for (V& p : peak) p = S::fill(-std::numeric_limits<T>::infinity());
        each_key_row(t, [&](auto rows, int s, int first) INLINE_LAMBDA {
            constexpr int R = decltype(rows)::value;
            const T* p = scratch.tile + ((s * K + t.reach.from) * ROWS + first) * L;
            V high[R];
            for (int r = 0; r < R; ++r) high[r] = peak[first + r];
            for (int j = t.reach.from; j < t.reach.to; ++j, p += ROWS * L)
                for (int r = 0; r < R; ++r) high[r] = S::larger(S::load(p + r * L), high[r]);
            for (int r = 0; r < R; ++r) peak[first + r] = high[r];
        });
        each_key_row(t, [&](auto rows, int s, int first) INLINE_LAMBDA {
            constexpr int R = decltype(rows)::value;
            T* p = scratch.tile + ((s * K + t.reach.from) * ROWS + first) * L;
            V high[R], sum[R];
            for (int r = 0; r < R; ++r) high[r] = peak[first + r], sum[r] = total[first + r];
            for (int j = t.reach.from; j < t.reach.to; ++j, p += ROWS * L)
                for (int r = 0; r < R; ++r) {
                    const V e = S::exponential(S::load(p + r * L) - high[r]);
                    S::store(p + r * L, e);
                    sum[r] += e;
                }
            for (int r = 0; r < R; ++r) total[first + r] = sum[r];
        });
        for (int r = 0; r < t.rows; ++r) {
            inverse[r] = T(1) / total[r];
            S::store(lse_rows + r * lanes, peak[r] + S::logarithm(total[r]));
            for (int l = 0; l < std::min<i64>(L, W * G - t.v * L); ++l) broken |= total[r][l] != total[r][l];
        }
        Step steps[2 * kMaxWindow];
        if (pooled) {
            V quarter[ROWS];
            for (V& q : quarter) q = S::fill(T(0.25));
            sum_pairs(scratch, t, inverse, ROWS * L, [&](int pair, int s) { return pair_tile(scratch, pair, s); });
            weigh_channels<false>(steps, list_pair_steps(scratch, t, steps), t.rows / 2, 0, D, quarter, out_rows);
        } else {
            weigh_channels<false>(steps, list_steps(scratch, t, t.value, steps), t.rows, 0, D, inverse, out_rows);
        }
        if (broken) infinite_sums(scratch, t, peak, lse_rows);
    }

    // Log-sum-exp where the softmax is NaN: an infinite largest score, or NaN where a score is NaN.
    void infinite_sums(const Scratch& scratch, const Tile& t, const V* peak, T* lse_rows) const {
        scores(scratch, t);
        for (int r = 0; r < t.rows; ++r) {
            V nan = {}, lse = S::load(lse_rows + r * lanes);
            for (int s = std::max(r, t.s_from); s < std::min(r + K, t.s_to); ++s)
                for (int j = t.reach.from; j < t.reach.to; ++j) {
                    const V x = S::load(scratch.tile + ((s * K + j) * ROWS + r) * L);
                    nan += x != x ? x : V{};
                }
            S::store(lse_rows + r * lanes, lse == lse ? lse : peak[r] + nan);
        }
    }

    // The weighted sum over the key rows of a tile: weights of the tile, the packed rows `of`.
    int list_steps(const Scratch& scratch, const Tile& t, const T* const* of, Step* steps) const {
        int count = 0;
        for (int s = t.s_from; s < t.s_to; ++s) {
            const int first = std::max(0, s - K + 1);
            steps[count++] = {scratch.tile + (s * K + t.reach.from) * ROWS * L, of[s] + t.reach.from * G, pitch, G,
                              t.reach.to - t.reach.from, first, std::min(t.rows, s + 1) - first};
        }
        return count;
    }

    void score_gradients(const Scratch& scratch, const Tile& t) const {  // P -> dS
        const i64 next = plane + G, up = i64(K) * plane;
        each_block(t, [&](auto rows, auto width, int s, int first, int j0) INLINE_LAMBDA {
            constexpr int R = decltype(rows)::value, J = decltype(width)::value;
            V acc[R][J] = {};
            P::multiply(acc, scratch.tile_grad + first * L, L, ROWS * L, t.value[s] + j0 * G, G, pitch, D);
            T* p = scratch.tile + ((s * K + j0) * ROWS + first) * L;
            for (int r = 0; r < R; ++r) {
                const V delta = t.delta[first + r];
                for (int j = 0; j < J; ++j) acc[r][j] = S::load(p + (j * ROWS + r) * L) * (acc[r][j] - delta);
            }
            if (t.edge)
                for (int j = 0; j < J; ++j)
                    for (int r = 0; r < R; ++r) acc[r][j] = S::pick(live[t.v * K + j0 + j], acc[r][j], V{});
            for (int r = 0; r < R; ++r) {
                T* ring = t.grad_score[first + r] + (s - first - r) * up + j0 * next - back * G;
                for (int j = 0; j < J; ++j) {
                    S::store(p + (j * ROWS + r) * L, acc[r][j]);
                    S::store(ring + j * next, acc[r][j]);
                }
            }
        });
    }

    void backward_tile(const Scratch& scratch, Tile& t, T* out_rows) const {
        relative_logits(scratch);
        scores(scratch, t);
        const i64 next = plane + G, up = i64(K) * plane;  // ring: one offset on, one key row on
        each_key_row(t, [&](auto rows, int s, int first) INLINE_LAMBDA {  // scores -> P
            constexpr int R = decltype(rows)::value;
            T *p = scratch.tile + ((s * K + t.reach.from) * ROWS + first) * L, *ring[R];
            V lse[R];
            for (int r = 0; r < R; ++r) {
                lse[r] = t.lse[first + r];
                if (!pooled) ring[r] = t.prob[first + r] + (s - first - r) * up + t.reach.from * next - back * G;
            }
            for (int j = t.reach.from; j < t.reach.to; ++j, p += ROWS * L)
                for (int r = 0; r < R; ++r) {
                    const V e = S::exponential(S::load(p + r * L) - lse[r]);
                    S::store(p + r * L, e);
                    if (pooled) continue;
                    S::store(ring[r], e);
                    ring[r] += next;
                }
        });
        if (t.coarse) normalise(scratch, t);
        V ones[ROWS];
        for (V& one : ones) one = S::fill(1);
        if (pooled) {
            sum_pairs(scratch, t, ones, next, [&](int pair, int s) {
                return t.prob[pair] + (s - 2 * pair) * up - back * G;
            });
            pair_products(scratch, t);
            pair_score_gradients(scratch, t);
        } else {
            score_gradients(scratch, t);
        }
        Step steps[2 * kMaxWindow + 1];
        const int count = has_key ? list_steps(scratch, t, t.key, steps) : 0;
        if (!has_rel) return weigh_channels<false>(steps, count, t.rows, 0, D, ones, out_rows);
        sum_scores(scratch, t);
        const i64 half = D / 2;
        for (int part = 0; part < 2; ++part) {
            steps[count] = {part ? scratch.col_logits : scratch.row_logits, scratch.embedding, i64(K) * L, L, K, 0, t.rows};
            weigh_channels<false>(steps, count + 1, t.rows, part * half, part * half + half, ones, out_rows);
        }
    }

    // P / sum of P: a log-sum-exp of 1e4 is known to 5e-4 only in fp32, and so is P made from it.
    void normalise(const Scratch& scratch, const Tile& t) const {
        for (int r = 0; r < t.rows; ++r) {
            V total = {};
            auto each = [&](auto&& f) {
                for (int s = std::max(r, t.s_from); s < std::min(r + K, t.s_to); ++s)
                    for (int j = t.reach.from; j < t.reach.to; ++j) {
                        const i64 at = ((s - r) * K + j) * plane + (j - back) * G;
                        f(scratch.tile + ((s * K + j) * ROWS + r) * L, pooled ? nullptr : t.prob[r] + at);
                    }
            };
            each([&](T* p, T*) { total += S::load(p); });
            for (int l = 0; l < L; ++l) total[l] = total[l] > 0 ? total[l] : 1;  // a lane that takes no part
            each([&](T* p, T* ring) {
                S::store(p, S::load(p) / total);
                if (ring) S::store(ring, S::load(p));
            });
        }
    }

    // Row and column sums of dS, the gradients of the relative logits: for the whole map row, and over the logits.
    void sum_scores(const Scratch& scratch, const Tile& t) const {
        for (int r = 0; r < t.rows; ++r) {
            T *row = scratch.row_logits + r * L, *col = scratch.col_logits + r * L;
            for (int i = 0; i < K; ++i) S::store(row + i * ROWS * L, V{}), S::store(col + i * ROWS * L, V{});
            constexpr int width = score_width(1);
            for (int j0 = t.reach.from; j0 < t.reach.to; j0 += width) {
                with_constant<width>(std::min(width, t.reach.to - j0), [&](auto n) INLINE_LAMBDA {
                    constexpr int J = decltype(n)::value;
                    V down[J] = {};
                    for (int s = std::max(r, t.s_from); s < std::min(r + K, t.s_to); ++s) {
                        const T* p = scratch.tile + ((s * K + j0) * ROWS + r) * L;
                        V across = S::load(row + (s - r) * ROWS * L);
                        for (int j = 0; j < J; ++j) {
                            const V ds = S::load(p + j * ROWS * L);
                            down[j] += ds, across += ds;
                        }
                        S::store(row + (s - r) * ROWS * L, across);
                    }
                    for (int j = 0; j < J; ++j) S::store(col + (j0 + j) * ROWS * L, down[j]);
                });
            }
            // Where delta is not finite, the definition has 0 * inf at the keys outside the map.
            for (int l = 0; l < std::min<i64>(L, W * G - t.v * L); ++l)
                if (!std::isfinite(t.delta[r][l]))
                    for (int i = 0; i < K; ++i)
                        for (int j = 0; j < K; ++j)
                            if (r + i < t.s_from || r + i >= t.s_to || !live[t.v * K + j][l])
                                row[i * ROWS * L + l] = col[j * ROWS * L + l] = std::numeric_limits<T>::quiet_NaN();
            for (int i = 0; i < K; ++i) {
                const i64 at = (r * K + i) * lanes + t.v * L;
                S::store(scratch.grad_row + at, S::load(row + i * ROWS * L));
                S::store(scratch.grad_col + at, S::load(col + i * ROWS * L));
            }
        }
    }
};

}  // namespace
