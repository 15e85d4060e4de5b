// The two products of local attention's kernel, on tiles of up to ROWS query rows x one vector of lanes.

#pragma once

#include "simd.h"

namespace {

constexpr int ROWS = 4;

template <class T, int L>
struct Products {
    using S = Simd<T, L>;
    using V = typename S::V;

    // acc[r][j] += sum over t < n of a[r * a_r + t * a_t] * b[j * b_j + t * b_t]
    template <int R, int J>
    static INLINE void multiply(V (&acc)[R][J], const T* a, i64 a_r, i64 a_t, const T* b, i64 b_j, i64 b_t, i64 n) {
        for (i64 t = 0; t < n; ++t, a += a_t, b += b_t) {
            V av[R];
            for (int r = 0; r < R; ++r) av[r] = S::load_once(a + r * a_r);
            for (int j = 0; j < J; ++j) {
                const V bv = R > 1 ? S::load_once(b + j * b_j) : S::load(b + j * b_j);
                for (int r = 0; r < R; ++r) acc[r][j] += av[r] * bv;
            }
        }
    }

    struct Step {  // one key row (or embedding) of a weighted sum: rows first .. first+rows-1 of the tile take part
        const T *a, *b;
        i64 b_c, b_j;
        int offsets, first, rows;
    };

    // to[r][c] = factor[r] * sum over steps and offsets j of a[r][j] * b[c][j], for C channels from `channel` on.
    // Weights of a tile lie at strides known here (RING false), those of the ring at `a_r` and `a_j`.
    template <int C, bool RING>
    static void weigh(const Step* steps, int count, int rows, i64 channel, const V* factor, i64 a_r, i64 a_j, T* to,
                      i64 to_r, i64 to_c) {
        V acc[ROWS][C] = {};
        if (!RING) a_r = L, a_j = ROWS * L;
        for (const Step* s = steps; s < steps + count; ++s) {
            auto add = [&](auto first_row, auto n_rows) INLINE_LAMBDA {
                constexpr int first = decltype(first_row)::value, n = decltype(n_rows)::value;
                const T *a = s->a + first * a_r, *b = s->b + channel * s->b_c;
                const i64 b_c = s->b_c, b_j = s->b_j;
                for (int j = s->offsets; j > 0; --j, a += a_j, b += b_j) {
                    V av[n];
                    for (int r = 0; r < n; ++r) av[r] = S::load_once(a + r * a_r);
                    for (int c = 0; c < C; ++c) {
                        const V bv = n > 1 ? S::load_once(b + c * b_c) : S::load(b + c * b_c);
                        for (int r = 0; r < n; ++r) acc[first + r][c] += av[r] * bv;
                    }
                }
            };
            static_assert(ROWS == 4, "the cases below");
            switch (s->first * 8 + s->rows) {
                case 1: add(Int<0>{}, Int<1>{}); break;
                case 2: add(Int<0>{}, Int<2>{}); break;
                case 3: add(Int<0>{}, Int<3>{}); break;
                case 4: add(Int<0>{}, Int<4>{}); break;
                case 9: add(Int<1>{}, Int<1>{}); break;
                case 10: add(Int<1>{}, Int<2>{}); break;
                case 11: add(Int<1>{}, Int<3>{}); break;
                case 17: add(Int<2>{}, Int<1>{}); break;
                case 18: add(Int<2>{}, Int<2>{}); break;
                case 25: add(Int<3>{}, Int<1>{}); break;
            }
        }
        for (int r = 0; r < ROWS; ++r)
            if (r < rows)
                for (int c = 0; c < C; ++c) S::store(to + r * to_r + (channel + c) * to_c, acc[r][c] * factor[r]);
    }
};

}  // namespace
