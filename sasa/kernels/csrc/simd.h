// Vectors of L numbers: loads and stores, exponential and logarithm, transposes.
// Infinities and NaNs must come out as in the definition: build without -ffast-math.

#pragma once

#include <cmath>
#include <cstring>
#include <type_traits>
#include <utility>
#if defined(__AVX512VL__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#include "maps.h"

#define INLINE inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))

namespace {

#if defined(__AVX512VL__) || defined(__aarch64__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif
#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <int N>
using Int = std::integral_constant<int, N>;

template <int MAX, class F>
INLINE void with_constant(int n, F&& f) {  // calls f with n, 1 <= n <= MAX, as a compile-time constant
    if constexpr (MAX > 1) {
        if (n < MAX) return with_constant<MAX - 1>(n, f);
    }
    f(Int<MAX>{});
}

template <class T, int L>
struct Simd {
    typedef T V __attribute__((vector_size(L * sizeof(T))));
    typedef T Unaligned __attribute__((vector_size(L * sizeof(T)), aligned(sizeof(T)), may_alias));
    using Word = std::conditional_t<sizeof(T) == 4, std::int32_t, i64>;
    typedef Word Mask __attribute__((vector_size(L * sizeof(T))));

    static INLINE V load(const T* p) { return *reinterpret_cast<const Unaligned*>(p); }
    static INLINE void store(T* p, V v) { *reinterpret_cast<Unaligned*>(p) = v; }
    // A load that stays one: the compiler would otherwise repeat it as an operand of each multiply-add.
    static INLINE V load_once(const T* p) {
        V v = load(p);
#if defined(__AVX512VL__)
        asm("" : "+v"(v));
#elif defined(__AVX2__)
        if constexpr (sizeof(V) <= 32) asm("" : "+x"(v));
#endif
        return v;
    }
    // A store past the caches, where a line is whole: its old content is not read, and nothing else leaves the caches.
    static INLINE void stream(T* p, V v) {
#if defined(__AVX512F__)
        if constexpr (sizeof(V) == 64)
            if (reinterpret_cast<std::uintptr_t>(p) % 64 == 0)
                return _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)v);
#endif
        store(p, v);
    }
    static INLINE void end_streams() {  // before another thread may read what was streamed
#if defined(__AVX512F__) || defined(__AVX2__)
        _mm_sfence();
#endif
    }
    static INLINE void copy(const T* from, T* to, i64 n) { std::memcpy(to, from, n * sizeof(T)); }
    // `n` numbers that nobody reads soon, past the caches. Those that follow one another fill whole lines.
    static INLINE void copy_out(const T* from, T* to, i64 n) {
        i64 i = 0;
#if defined(__AVX512F__)
        if constexpr (sizeof(V) == 64)
            if (reinterpret_cast<std::uintptr_t>(to) % 64 == 0)
                for (; i + L <= n; i += L) _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), (__m512i)load(from + i));
#elif defined(__AVX2__)
        if constexpr (sizeof(V) == 32)
            if (reinterpret_cast<std::uintptr_t>(to) % 32 == 0)
                for (; i + L <= n; i += L) _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i), (__m256i)load(from + i));
#endif
        copy(from + i, to + i, n - i);
    }
    static INLINE V fill(T x) { return V{} + x; }
    static INLINE V pick(Mask m, V yes, V no) { return m ? yes : no; }
    static INLINE V larger(V a, V b) { return a > b ? a : b; }  // b where either is NaN

    static INLINE V load(const T* p, i64 n) {  // n < L: zeros beyond, and nothing beyond is touched
        V v{};
#if defined(__AVX512VL__)
        if constexpr (sizeof(T) == 4 && L == 8) return (V)_mm256_maskz_loadu_ps((1u << n) - 1, p);
        if constexpr (sizeof(T) == 4 && L == 16) return (V)_mm512_maskz_loadu_ps((1u << n) - 1, p);
#endif
        std::memcpy(&v, p, n * sizeof(T));
        return v;
    }
    static INLINE void store(T* p, V v, i64 n) {
#if defined(__AVX512VL__)
        if constexpr (sizeof(T) == 4 && L == 8) return _mm256_mask_storeu_ps(p, (1u << n) - 1, (__m256)v);
        if constexpr (sizeof(T) == 4 && L == 16) return _mm512_mask_storeu_ps(p, (1u << n) - 1, (__m512)v);
#endif
        std::memcpy(p, &v, n * sizeof(T));
    }

    // e^x for x <= 0, exactly 0 below -88 (fp32), NaN for NaN.
    static INLINE V exponential(V x) {
        if constexpr (sizeof(T) == 4) {
            // 2^n * 2^f with |f| <= 1/2: adding 1.5 * 2^23 rounds to an integer in the low bits, adding 127 makes them
            // the exponent field of 2^n. The polynomial of 2^f is our fit, relative error 9e-8, exact at 0.
            const float shift = 12582912.0f + 127.0f, log2e = 1.44269504f;
            x = larger(fill(-88.2f), x);
            const V shifted = x * log2e + shift;
            const V f = x * log2e - (shifted - shift);
            V p = f * 0.0013264727f + 0.0096715130f;
            p = p * f + 0.0555073358f;
            p = p * f + 0.2402224243f;
            p = p * f + 0.6931470037f;
            p = p * f + 1.0f;
            return p * (V)((Mask)shifted << 23);
        } else {
            for (int l = 0; l < L; ++l) x[l] = std::exp(x[l]);
            return x;
        }
    }
    // Natural logarithm of x >= 1 (finite), NaN for NaN.
    static INLINE V logarithm(V x) {
        if constexpr (sizeof(T) == 4) {
            // x = 2^n * m with m in [sqrt(1/2), sqrt(2)); log m = 2 * artanh(s), s = (m - 1) / (m + 1), by its series:
            // |s| < 0.172, so what is left out is below 1e-9.
            const Mask bits = (Mask)x, n = (bits - 0x3f3504f3) >> 23;
            const V m = (V)(bits - (n << 23)), s = (m - 1) / (m + 1), q = s * s;
            V p = q * (2.0f / 9) + 2.0f / 7;
            p = p * q + 2.0f / 5;
            p = p * q + 2.0f / 3;
            const V exponent = (V)(n + 0x4b400000) - 12582912.0f;  // n as a number: 0x4b400000 is 1.5 * 2^23
            const V log = exponent * 0.693147181f + (p * q * s + s * 2);
            return pick(x == x, log, x);
        } else {
            for (int l = 0; l < L; ++l) x[l] = std::log(x[l]);
            return x;
        }
    }

    // G vectors a, b, ... -> the same G * L numbers as a0 b0 .. a1 b1 ..; G = L is a transpose. A round moves the highest
    // bit of a number's place to the lowest, so LINES = L is the transpose of L rows of G numbers.
    template <int G, int LINES = G>
    static INLINE void interleave(V (&v)[L]) {
        for (int round = 1; round < LINES; round *= 2) {
            V t[L];
            for (int i = 0; i < G / 2; ++i) zip(v[i], v[i + G / 2], t[2 * i], t[2 * i + 1], Lanes{});
            for (int i = 0; i < G; ++i) v[i] = t[i];
        }
    }
    template <int G, int LINES = G>
    static INLINE void separate(V (&v)[L]) {  // the inverse
        for (int round = 1; round < LINES; round *= 2) {
            V t[L];
            for (int i = 0; i < G / 2; ++i) unzip(v[2 * i], v[2 * i + 1], t[i], t[i + G / 2], Lanes{});
            for (int i = 0; i < G; ++i) v[i] = t[i];
        }
    }
    template <int... AT>
    static INLINE V shuffle(V a, V b) {
#if defined(__clang__)
        return __builtin_shufflevector(a, b, AT...);
#else
        return __builtin_shuffle(a, b, Mask{AT...});
#endif
    }
    using Lanes = std::make_integer_sequence<int, L>;
    template <int... I>
    static INLINE void zip(V a, V b, V& low, V& high, std::integer_sequence<int, I...>) {
        low = shuffle<(I / 2 + I % 2 * L)...>(a, b), high = shuffle<(I / 2 + I % 2 * L + L / 2)...>(a, b);
    }
    template <int... I>
    static INLINE void unzip(V a, V b, V& even, V& odd, std::integer_sequence<int, I...>) {
        even = shuffle<2 * I...>(a, b), odd = shuffle<(2 * I + 1)...>(a, b);
    }
};

}  // namespace
