// Local attention and the average of 2 x 2 blocks after it: what a pair of rows shares.
//
// The output is pooled before it is written, and the map before the pool never exists. Both rows of a pair have the same
// gradient, a quarter of the pooled one: P of the two is summed before it meets the values and before it waits in the
// ring, and dP is computed once for both. delta = the sum of P * dP, since there is no output to have it from.

#pragma once

#include <cstring>

#include "frame.h"

namespace {

struct PairedRows : Frame {
    using Frame::Frame;

    struct Pairs {  // those of a tile that key row s takes part in
        int first, end;
    };
    Pairs pairs_at(const Tile& t, int s) const { return {s > K ? (s - K + 1) / 2 : 0, std::min(t.rows, s + 2) / 2}; }

    T* pair_tile(const Scratch& scratch, int pair, int s) const { return scratch.tile_pair + (s * K * ROWS + pair) * L; }

    // P of both rows, each times its factor, to at(pair, s)[j * step].
    template <class F>
    void sum_pairs(const Scratch& scratch, const Tile& t, const V* factor, i64 step, F&& at) const {
        for (int s = t.s_from; s < t.s_to; ++s) {
            const Pairs pairs = pairs_at(t, s);
            for (int p = pairs.first; p < pairs.end; ++p) {
                const int row = 2 * p;
                const bool upper = s < row + K, lower = s > row;
                const V f = upper ? factor[row] : V{}, g = lower ? factor[row + 1] : V{};
                const T* from = scratch.tile + (s * K * ROWS + row) * L;
                T* to = at(p, s);
                for (int j = t.reach.from; j < t.reach.to; ++j) {
                    const T* two = from + j * ROWS * L;
                    V sum = upper ? S::load(two) * f : V{};
                    if (lower) sum += S::load(two + L) * g;
                    S::store(to + j * step, sum);
                }
            }
        }
    }

    int list_pair_steps(const Scratch& scratch, const Tile& t, Step* steps) const {
        int count = 0;
        for (int s = t.s_from; s < t.s_to; ++s) {
            const Pairs pairs = pairs_at(t, s);
            steps[count++] = {pair_tile(scratch, 0, s) + t.reach.from * ROWS * L, t.value[s] + t.reach.from * G, pitch, G,
                              t.reach.to - t.reach.from, pairs.first, pairs.end - pairs.first};
        }
        return count;
    }

    // dP of both rows of a pair into tile_pair, and delta = the sum of P * dP.
    void pair_products(const Scratch& scratch, Tile& t) const {
        constexpr int width = score_width(2);
        for (int s = t.s_from; s < t.s_to; ++s) {
            const Pairs pairs = pairs_at(t, s);
            with_constant<2>(pairs.end - pairs.first, [&](auto n) INLINE_LAMBDA {
                constexpr int R = decltype(n)::value;
                for (int j0 = t.reach.from; j0 < t.reach.to; j0 += width)
                    with_constant<width>(std::min(width, t.reach.to - j0), [&](auto w) INLINE_LAMBDA {
                        constexpr int J = decltype(w)::value;
                        V acc[R][J] = {};
                        P::multiply(acc, scratch.tile_grad + pairs.first * L, L, ROWS * L, t.value[s] + j0 * G, G, pitch, D);
                        T* to = pair_tile(scratch, pairs.first, s) + j0 * ROWS * L;
                        for (int r = 0; r < R; ++r)
                            for (int j = 0; j < J; ++j) S::store(to + (j * ROWS + r) * L, acc[r][j]);
                    });
            });
        }
        for (int r = 0; r < t.rows; ++r) {
            V total = {};
            for (int s = std::max(r, t.s_from); s < std::min(r + K, t.s_to); ++s) {
                const T *p = scratch.tile + (s * K * ROWS + r) * L, *dp = pair_tile(scratch, r / 2, s);
                for (int j = t.reach.from; j < t.reach.to; ++j) total += S::load(p + j * ROWS * L) * S::load(dp + j * ROWS * L);
            }
            t.delta[r] = total;
        }
    }

    void pair_score_gradients(const Scratch& scratch, const Tile& t) const {
        const i64 next = plane + G, up = i64(K) * plane;
        for (int r = 0; r < t.rows; ++r)
            for (int s = std::max(r, t.s_from); s < std::min(r + K, t.s_to); ++s) {
                T *p = scratch.tile + (s * K * ROWS + r) * L, *ring = t.grad_score[r] + (s - r) * up - back * G;
                const T* dp = scratch.tile_pair + (s * K * ROWS + r / 2) * L;
                for (int j = t.reach.from; j < t.reach.to; ++j) {
                    V ds = S::load(p + j * ROWS * L) * (S::load(dp + j * ROWS * L) - t.delta[r]);
                    if (t.edge) ds = S::pick(live[t.v * K + j], ds, V{});
                    S::store(p + j * ROWS * L, ds);
                    S::store(ring + j * next, ds);
                }
            }
    }

    // Row y of the pooled gradient, a quarter of it at each of the columns that share it.
    void spread_row(const Scratch& s, i64 b, i64 n, i64 y, T* to) const {
        pooled_packing.pack(grad_out, b, n, y, D, T(0.25), s.row, pitch);
        packing.with_group([&](auto group) INLINE_LAMBDA {
            constexpr int g = decltype(group)::value;
            for (i64 c = 0; c < D; ++c)
                for (i64 x = 0; x < W / 2; ++x)
                    for (int half = 0; half < 2; ++half)
                        std::memcpy(to + c * pitch + (2 * x + half) * g, s.row + c * pitch + x * g, g * sizeof(T));
        });
    }

    // The sums of two columns leave as row y of the output.
    void unpack_pooled(const Scratch& s, const T* rows, i64 b, i64 n, i64 y) const {
        packing.with_group([&](auto group) INLINE_LAMBDA {
            constexpr int g = decltype(group)::value;
            for (i64 c = 0; c < D; ++c)
                for (i64 x = 0; x < W / 2; ++x) {
                    const T* two = rows + c * pitch + 2 * x * g;
                    for (int l = 0; l < g; ++l) s.row[c * pitch + x * g + l] = two[l] + two[g + l];
                }
        });
        pooled_packing.unpack(s.row, pitch, b, n, y, D, 1, out);
    }
};

}  // namespace
