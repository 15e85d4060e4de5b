// Rows of maps in any strides -> packed planes of the stem's kernel, and back.
//
// Lane l of plane q is column l * queries + q of a row, of W columns.

#pragma once

#include <algorithm>

#include "simd.h"

namespace {

template <class T, int L>
struct Planes {
    using S = Simd<T, L>;
    using V = typename S::V;

    i64 lanes;  // of a plane, a multiple of L

    // Row y of `depth` channels -> to[q][channel][lane]; zeros in lanes beyond the map.
    void pack(const Map<const T>& m, i64 b, i64 n, i64 y, i64 depth, T* to, i64 step, i64 plane, i64 queries, i64 W) const {
        const T* from = m.p + b * m.b + n * m.n + y * m.y;
        i64 whole = 0;  // lanes that are done four columns at a time
        for (; m.x == 1 && queries == 4 && (whole + L) * 4 <= W; whole += L)
            for (i64 c = 0; c < depth; ++c) {
                V v[L];
                for (i64 q = 0; q < 4; ++q) v[q] = S::load(from + c * m.c + whole * 4 + q * L);
                S::template separate<4>(v);
                for (i64 q = 0; q < 4; ++q) S::store(to + q * plane + c * step + whole, v[q]);
            }
        for (i64 q = 0; q < queries; ++q)
            for (i64 lane = whole; lane < lanes; lane += L) {
                const i64 count = std::clamp<i64>((W - q + queries - 1) / queries - lane, 0, L);
                T* p = to + q * plane + lane;
                if (m.c == 1 && depth >= L) {
                    for (i64 c = 0; c < depth; c += L) {
                        const i64 n_c = std::min<i64>(L, depth - c);
                        V v[L];
                        for (i64 l = 0; l < L; ++l) {
                            const T* pixel = from + ((lane + l) * queries + q) * m.x + c;
                            v[l] = l >= count ? V{} : n_c == L ? S::load(pixel) : S::load(pixel, n_c);
                        }
                        S::template interleave<L>(v);
                        for (i64 k = 0; k < n_c; ++k) S::store(p + (c + k) * step, v[k]);
                    }
                    continue;
                }
                for (i64 c = 0; c < depth; ++c) {
                    const T* row = from + c * m.c + (lane * queries + q) * m.x;
                    if (m.x * queries == 1) {
                        S::store(p + c * step, count == L ? S::load(row) : S::load(row, count));
                    } else {
                        V v{};
                        for (i64 l = 0; l < count; ++l) v[l] = row[l * queries * m.x];
                        S::store(p + c * step, v);
                    }
                }
            }
    }

    // The inverse of `pack`; lanes beyond the map are not written.
    void unpack(const T* from, i64 step, i64 plane, i64 b, i64 n, i64 y, i64 depth, const Map<T>& m, i64 queries,
                i64 W) const {
        T* to = m.p + b * m.b + n * m.n + y * m.y;
        for (i64 lane = 0; lane < lanes; lane += L)
            if (m.c == 1 && depth >= L) {
                for (i64 q = 0; q < queries; ++q)
                    for (i64 c = 0; c < depth; c += L) {
                        const i64 n_c = std::min<i64>(L, depth - c), count = (W - q + queries - 1) / queries - lane;
                        V v[L];
                        for (i64 k = 0; k < L; ++k) v[k] = k < n_c ? S::load(from + q * plane + (c + k) * step + lane) : V{};
                        S::template interleave<L>(v);
                        for (i64 l = 0; l < std::min<i64>(L, count); ++l) {
                            T* pixel = to + ((lane + l) * queries + q) * m.x + c;
                            if (n_c == L)
                                S::store(pixel, v[l]);
                            else
                                S::store(pixel, v[l], n_c);
                        }
                    }
            } else if (m.x == 1 && queries == 4 && (lane + L) * 4 <= W) {
                for (i64 c = 0; c < depth; ++c) {
                    V v[L];
                    for (i64 q = 0; q < 4; ++q) v[q] = S::load(from + q * plane + c * step + lane);
                    S::template interleave<4>(v);
                    for (i64 q = 0; q < 4; ++q) S::store(to + c * m.c + lane * 4 + q * L, v[q]);
                }
            } else {
                for (i64 q = 0; q < queries; ++q)
                    for (i64 c = 0; c < depth; ++c) {
                        const T* p = from + q * plane + c * step + lane;
                        T* row = to + c * m.c + (lane * queries + q) * m.x;
                        const i64 count = (W - q + queries - 1) / queries - lane;
                        if (m.x * queries == 1 && count >= L)
                            S::store(row, S::load(p));
                        else
                            for (i64 l = 0; l < std::min<i64>(L, count); ++l) row[l * queries * m.x] = p[l];
                    }
            }
    }
};

}  // namespace
