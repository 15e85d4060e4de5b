// Rows of a layer's input -> packed rows of query, key or value: the 1x1 convolution inside local attention's kernel.
//
// Without gradients nothing else needs the three maps. They are made row by row, in the order of the lanes, so that they
// stay in the cache and are never transposed. A vector of weights is L / G channels of G heads for one input channel; a
// block is kPixels pixels times two such vectors, whose accumulators stay in registers.

#pragma once

#include <cstdlib>
#include <memory>
#include <new>

#include "packing.h"

namespace {

template <class T, int L>
struct Projection {
    using S = Simd<T, L>;
    using V = typename S::V;

    static constexpr int kPixels = kRegisters >= 32 ? 12 : 6, kPair = 2;

    struct Free {
        void operator()(T* p) const { std::free(p); }
    };

    i64 inputs, depth;                   // channels of the input; of a head
    int group, channels;                 // heads of a vector, and channels of each
    i64 vectors;                         // of a part: even, the last ones may be zeros
    std::unique_ptr<T[], Free> weights;  // [part][heads / G][vector][input channel][L]

    // weight: [part][head][channel][input channel]; the first part, the query, is multiplied by `scale`.
    Projection(const T* weight, i64 parts, i64 heads, i64 head_depth, i64 in_channels, int g, T scale)
        : inputs(in_channels), depth(head_depth), group(g), channels(L / g) {
        vectors = round_up((depth + channels - 1) / channels, kPair);
        const i64 groups = heads / group, one = vectors * inputs * L;
        weights.reset(static_cast<T*>(std::aligned_alloc(64, round_up(parts * groups * one * sizeof(T), 64))));
        if (!weights) throw std::bad_alloc();
        for (i64 p = 0; p < parts; ++p)
            for (i64 n = 0; n < groups; ++n)
                for (i64 v = 0; v < vectors; ++v)
                    pack(weight + (p * heads + n * group) * depth * inputs, v, p ? T(1) : scale,
                         weights.get() + (p * groups + n) * one + v * inputs * L);
    }

    void pack(const T* from, i64 vector, T factor, T* to) const {
        const T* row[L];
        for (int l = 0; l < L; ++l) {
            const i64 c = vector * channels + l / group;
            row[l] = c < depth ? from + (l % group * depth + c) * inputs : nullptr;
        }
        for (i64 k = 0; k < inputs; k += L) {
            const i64 n = std::min<i64>(L, inputs - k);
            V v[L];
            for (int l = 0; l < L; ++l) v[l] = row[l] ? n == L ? S::load(row[l] + k) : S::load(row[l] + k, n) : V{};
            S::template interleave<L>(v);
            for (int i = 0; i < n; ++i) S::store(to + (k + i) * L, v[i] * factor);
        }
    }

    // `rows` rows of `columns` pixels, channels innermost -> to(row)[channel * step + lane] of a part of G heads.
    template <class F>
    void rows(i64 part, i64 heads, i64 head, const Map<const T>& x, i64 b, i64 y, i64 count, i64 columns, F&& to,
              i64 step) const {
        const T* w = weights.get() + (part * (heads / group) + head / group) * vectors * inputs * L;
        const i64 blocks = (columns + kPixels - 1) / kPixels;
        for (i64 v = 0; v < vectors; v += kPair, w += kPair * inputs * L)
            for (i64 r = 0; r < count; ++r) {
                const T* from = x.p + b * x.b + (y + r) * x.y;
                T* row = to(y + r);
                for (i64 i = 0; i < blocks; ++i) {
                    const i64 first = i * columns / blocks, end = (i + 1) * columns / blocks;
                    with_constant<kPixels>(end - first, [&](auto n) INLINE_LAMBDA {
                        block<decltype(n)::value>(from + first * x.x, x.x, w, v * channels, row + first * group, step);
                    });
                }
            }
    }

    template <int R>
    void block(const T* x, i64 x_step, const T* w, i64 channel, T* to, i64 step) const {
        V acc[R][kPair] = {};
        for (i64 k = 0; k < inputs; ++k) {
            V wide[kPair];
            for (int j = 0; j < kPair; ++j) wide[j] = S::load_once(w + (j * inputs + k) * L);
            for (int r = 0; r < R; ++r) {
                const T one = x[r * x_step + k];
                for (int j = 0; j < kPair; ++j) acc[r][j] += one * wide[j];
            }
        }
        Packing<T, L>{0, group}.with_group([&](auto g) INLINE_LAMBDA {
            constexpr int G = decltype(g)::value;
            for (int r = 0; r < R; ++r)
                for (int j = 0; j < kPair; ++j)
                    for (int c = 0; c < L / G; ++c) {
                        const i64 at = channel + j * (L / G) + c;
                        if (at < depth)
                            std::memcpy(to + at * step + r * G, reinterpret_cast<const T*>(&acc[r][j]) + c * G, G * sizeof(T));
                    }
        });
    }
};

}  // namespace
