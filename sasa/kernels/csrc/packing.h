// Rows of maps in any strides -> packed rows of local attention's kernel, and back.
//
// G neighbouring heads of one image are interleaved: lane x * G + g of a packed row is head g at column x.

#pragma once

#include <algorithm>

#include "simd.h"

namespace {

template <class T, int L>
struct Packing {
    using S = Simd<T, L>;
    using V = typename S::V;

    i64 W;  // columns of the map
    int G;  // heads of a packed row

    // Row y of G heads -> to[channel * pitch + lane], times `factor`.
    void pack(const Map<const T>& m, i64 b, i64 n, i64 y, i64 depth, T factor, T* to, i64 step) const {
        const T* from = m.p + b * m.b + n * m.n + y * m.y;
        if (m.x == 1) {
            with_group([&](auto g) INLINE_LAMBDA { pack_columns<decltype(g)::value>(m, from, depth, factor, to, step); });
        } else if (m.c == 1) {
            with_group([&](auto g) INLINE_LAMBDA { pack_pixels<decltype(g)::value>(m, from, depth, factor, to, step); });
        } else {
            for (i64 c = 0; c < depth; ++c)
                for (i64 x = 0; x < W; ++x)
                    for (int g = 0; g < G; ++g) to[c * step + x * G + g] = from[g * m.n + c * m.c + x * m.x] * factor;
        }
    }

    template <int g>
    void pack_columns(const Map<const T>& m, const T* from, i64 depth, T factor, T* to, i64 step) const {
        for (i64 c = 0; c < depth; ++c, from += m.c, to += step) {
            for (i64 x = 0; x < W; x += L) {
                if (W >= L) x = std::min<i64>(x, W - L);
                const i64 n = std::min<i64>(L, W - x);
                V v[L];
                for (int i = 0; i < g; ++i) v[i] = n == L ? S::load(from + i * m.n + x) : S::load(from + i * m.n + x, n);
                S::template interleave<g>(v);
                for (int i = 0; i < g && i * L < n * g; ++i) S::store(to + x * g + i * L, v[i] * factor);
            }
        }
    }

    // p; prefetches what lies `step` further, since no hardware foresees a row that is read in short pieces.
    static INLINE const T* soon(const T* p, i64 step) { return __builtin_prefetch(p + step, 0, 2), p; }

    // Maps whose channels lie side by side: a transpose of L lanes and their channels, L or `depth` of them at a time.
    template <int g>
    void pack_pixels(const Map<const T>& m, const T* from, i64 depth, T factor, T* to, i64 step) const {
        each_vector<g>(m, from, [&](const T* const* lane, int n, i64 at) INLINE_LAMBDA {
            if (!with_whole_heads<g>(m, depth, [&](auto channels) INLINE_LAMBDA {
                    constexpr int C = decltype(channels)::value;  // a load is L / C heads
                    V v[L];
                    for (int i = 0; i < C; ++i) v[i] = i * (L / C) < n ? S::load(soon(lane[i * (L / C)], m.y)) : V{};
                    S::template interleave<C, L>(v);
                    for (int c = 0; c < C; ++c) S::store(to + c * step + at, v[c] * factor);
                }))
                for (i64 c = 0; c < depth; c += L) {
                    const i64 n_c = std::min<i64>(L, depth - c);
                    V v[L];
                    if (n == L && n_c == L) {  // as below, without the questions
                        for (int l = 0; l < L; ++l) v[l] = S::load(soon(lane[l] + c, m.y));
                        S::template interleave<L>(v);
                        for (int k = 0; k < L; ++k) S::store(to + (c + k) * step + at, v[k] * factor);
                        continue;
                    }
                    for (int l = 0; l < L; ++l)
                        v[l] = l >= n ? V{} : n_c == L ? S::load(soon(lane[l] + c, m.y)) : S::load(lane[l] + c, n_c);
                    S::template interleave<L>(v);
                    for (int k = 0; k < n_c; ++k) S::store(to + (c + k) * step + at, v[k] * factor);
                }
        });
    }

    // f(lane, n, at) for each vector of a row: the addresses of its lanes, of which the first n are of the map.
    template <int g, class U, class F>
    INLINE void each_vector(const Map<U>& m, U* row, F&& f) const {
        for (i64 at = 0; at < W * g; at += L) {
            U* lane[L];
            for (int l = 0; l < L; ++l) lane[l] = row + (at / g + l / g) * m.x + l % g * m.n;
            f(lane, static_cast<int>(std::min<i64>(L, W * g - at)), at);
        }
    }

    // Calls f with the heads' width where it is below L and a vector is a whole number of heads of one pixel.
    template <int g, class U, class F>
    INLINE bool with_whole_heads(const Map<U>& m, i64 depth, F&& f) const {
        if (m.n != depth) return false;
        if constexpr (L > 4 && g * 4 >= L)
            if (depth == 4) return f(Int<4>{}), true;
        if constexpr (L > 8 && g * 8 >= L)
            if (depth == 8) return f(Int<8>{}), true;
        return false;
    }

    void unpack(const T* from, i64 step, i64 b, i64 n, i64 y, i64 depth, T factor, const Map<T>& m) const {
        T* to = m.p + b * m.b + n * m.n + y * m.y;
        if (m.x == 1) {
            with_group([&](auto g) INLINE_LAMBDA { unpack_columns<decltype(g)::value>(m, from, step, depth, factor, to); });
        } else if (m.c == 1) {
            with_group([&](auto g) INLINE_LAMBDA { unpack_pixels<decltype(g)::value>(m, from, step, depth, factor, to); });
        } else {
            for (i64 c = 0; c < depth; ++c)
                for (i64 x = 0; x < W; ++x)
                    for (int g = 0; g < G; ++g) to[g * m.n + c * m.c + x * m.x] = from[c * step + x * G + g] * factor;
        }
    }

    template <int g>
    void unpack_columns(const Map<T>& m, const T* from, i64 step, i64 depth, T factor, T* to) const {
        for (i64 c = 0; c < depth; ++c, from += step, to += m.c) {
            for (i64 x = 0; x < W; x += L) {
                if (W >= L) x = std::min<i64>(x, W - L);
                const i64 n = std::min<i64>(L, W - x);
                V v[L];
                for (int i = 0; i < g; ++i) v[i] = i * L < n * g ? S::load(from + x * g + i * L) * factor : V{};
                S::template separate<g>(v);
                for (int i = 0; i < g; ++i) {
                    if (n == L)
                        S::store(to + i * m.n + x, v[i]);
                    else
                        S::store(to + i * m.n + x, v[i], n);
                }
            }
        }
    }

    template <int g>
    void unpack_pixels(const Map<T>& m, const T* from, i64 step, i64 depth, T factor, T* to) const {
        each_vector<g>(m, to, [&](T* const* lane, int n, i64 at) INLINE_LAMBDA {
            if (!with_whole_heads<g>(m, depth, [&](auto channels) INLINE_LAMBDA {
                    constexpr int C = decltype(channels)::value;
                    V v[L];
                    for (int c = 0; c < C; ++c) v[c] = S::load(from + c * step + at) * factor;
                    S::template separate<C, L>(v);
                    for (int i = 0; i < C && i * (L / C) < n; ++i) S::stream(lane[i * (L / C)], v[i]);
                }))
                for (i64 c = 0; c < depth; c += L) {
                    const i64 n_c = std::min<i64>(L, depth - c);
                    V v[L];
                    if (n == L && n_c == L) {
                        for (int k = 0; k < L; ++k) v[k] = S::load(from + (c + k) * step + at) * factor;
                        S::template interleave<L>(v);
                        for (int l = 0; l < L; ++l) S::stream(lane[l] + c, v[l]);
                        continue;
                    }
                    for (int k = 0; k < L; ++k) v[k] = k < n_c ? S::load(from + (c + k) * step + at) * factor : V{};
                    S::template interleave<L>(v);
                    for (int l = 0; l < n; ++l) {
                        if (n_c == L)
                            S::stream(lane[l] + c, v[l]);
                        else
                            S::store(lane[l] + c, v[l], n_c);
                    }
                }
        });
    }

    template <class F>
    INLINE void with_group(F&& f) const {
        switch (G) {
            case 1: return f(Int<1>{});
            case 2: return f(Int<2>{});
            case 4: return f(Int<4>{});
            case 8:
                if constexpr (L >= 8) return f(Int<8>{});
                break;
            case 16:
                if constexpr (L >= 16) return f(Int<16>{});
        }
    }
};

}  // namespace
