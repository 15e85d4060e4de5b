// What the kernels for CPUs share: maps by their strides, and what a call returns.

#pragma once

#include <cstdint>

namespace {

using i64 = std::int64_t;

enum Result { kDone, kNoMemory, kOtherInterface };  // what a call returns; cpu.py raises the error


template <class T>
struct Map {  // a (B, N, D, H, W) tensor with strides in elements
    T* p;
    i64 b, n, c, y, x;
};

template <class T>
Map<T> map_of(const i64* f) {
    return {reinterpret_cast<T*>(f[0]), f[1], f[2], f[3], f[4], f[5]};
}

inline i64 round_up(i64 n, i64 to) { return (n + to - 1) / to * to; }

}  // namespace
