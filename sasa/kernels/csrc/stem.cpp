// Attention of the stem on the CPU: forward and backward behind a plain C interface (kernels/cpu.py builds and calls it).
//
// Shapes: B batch, C = 3 image channels, H x W image, N heads, D head width, M mixtures, S window side. Source:
// Ramachandran et al. 2019, section 3.3; the mathematics in PyTorch is kernels/stem.py.
//
// A head's logits are a C x C form of the pixels, and its output is D x (M * C) times the M * C sums over the window of
// attention * mixture * pixel. So nothing of head width is kept a window's position, and backward computes the softmax
// again: only the image and the weights are kept between the passes.
// Lanes. Sliding windows: lane x is the query at column x. Blocks: lane j is block j of a row of blocks, each position of
// a block has lanes of its own, and no pair of different blocks is computed.
// Pooled. With blocks and a max pool over them only one value of each block leaves, with its place, the mean and the
// variance over the map that a batch norm in between needs: nothing of the map's size is written or read again. It is the
// first whose product with the sign of the norm's weight is the largest.
// One task owns one image, or a strip of one where there are few; the weights' gradients are summed from one partial per
// task in fixed order, so results are the same bits for every thread count.

#include <cstddef>
#include <limits>
#include <new>
#include <vector>

#include "planes.h"
#include "threads.h"

namespace {

constexpr int C = 3;  // channels of the image: loops over them are unrolled

struct StemCall {  // one forward or backward call; cpu.py declares the same fields in the same order
    i64 batch, height, width, heads, depth, mixtures, side, sliding, zero_border, threads, parallel;
    i64 image[6], out[6];            // pointer, strides in elements of (B, 1, C, H, W) and (B, N, D, H, W)
    i64 forms, mixture, weight;      // contiguous (N, C, C), (S * S, M), (M, N * D, C)
    i64 index[6], moments, signs;    // pooled: (B, N, D, H/S, W/S) like out; (2, N * D) doubles: mean, variance; (N * D)
    i64 grad_out[6], grad_image[6];  // no grad_image: 0
    i64 grad_forms, grad_mixture, grad_weight;
    i64 slopes;  // pooled: (2, N * D); the gradient of a pixel is slopes[0] + slopes[1] * value, and grad_out at the chosen
};

template <class T, int L>
struct Stem {
    using S = Simd<T, L>;
    using V = typename S::V;
    using Mask = typename S::Mask;
    using Sums = V[C];

    static constexpr i64 kEnoughTasks = 16;  // a constant, not the machine's: results must not depend on the threads
    static constexpr int kBlock = 8;         // accumulators of a product

    StemCall call;
    bool backward, sliding, zero, image_gradient, pooled;
    i64 B, H, W, N, D, M, side, P, back, ahead, strips, strip_rows, queries, vectors, lanes, pitch, margin;
    const T *forms, *mixture, *weight;
    Planes<T, L> planes;
    Map<const T> image, grad_out, index_read;
    Map<T> out, grad_image, index;
    std::vector<Mask> live;       // [vector][b]: lanes whose key in the window's column b takes part
    std::vector<Mask> real;       // [vector][b]: lanes of a real query in column b of a block
    std::vector<char> edge;       // by vector: some lane of `live` is false
    std::vector<double> partial;  // [task] gradients of forms, mixture, weight; pooled forward: sums, sums of squares

    Stem(const StemCall& c, bool with_backward) : call(c), backward(with_backward) {
        B = c.batch, H = c.height, W = c.width, N = c.heads, D = c.depth, M = c.mixtures, side = c.side, P = side * side;
        sliding = c.sliding, zero = c.zero_border, image_gradient = c.grad_image[0], pooled = c.index[0];
        back = (side - 1) / 2, ahead = side / 2;
        forms = reinterpret_cast<const T*>(c.forms), mixture = reinterpret_cast<const T*>(c.mixture);
        weight = reinterpret_cast<const T*>(c.weight);
        image = map_of<const T>(c.image), grad_out = map_of<const T>(c.grad_out);
        out = map_of<T>(c.out), grad_image = map_of<T>(c.grad_image);
        index = map_of<T>(c.index), index_read = map_of<const T>(c.index);
        queries = sliding ? 1 : side;  // columns of a block
        const i64 columns = sliding ? W : (W + side - 1) / side;
        vectors = (columns + L - 1) / L, lanes = vectors * L, pitch = lanes + (sliding ? round_up(side, L) : 0);
        margin = sliding ? std::max<i64>(L, round_up(back, L)) : 0;  // zeros before a row: what a window reaches back
        // The gradient of the image crosses strips of sliding windows, so an image is one strip then.
        const i64 step = sliding ? 1 : side, wanted = sliding && image_gradient ? 1 : (kEnoughTasks + B - 1) / B;
        strip_rows = round_up((H + wanted - 1) / wanted, step), strips = (H + strip_rows - 1) / strip_rows;
        planes = {lanes};
        live.resize(vectors * side), real.resize(vectors * side), edge.resize(vectors);
        for (i64 v = 0; v < vectors; ++v)
            for (i64 b = 0; b < side; ++b)
                for (i64 l = 0; l < L; ++l) {
                    const i64 lane = v * L + l, x = sliding ? lane + b - back : lane * side + b;
                    const bool takes_part = zero || lane >= columns || (x >= 0 && x < W);
                    live[v * side + b][l] = -i64(takes_part);
                    real[v * side + b][l] = -i64(x < W);
                    if (!takes_part) edge[v] = 1;
                }
    }

    i64 partials() const { return backward ? N * C * C + P * M + M * N * D * C : pooled ? 2 * N * D : 0; }

    // -- scratch ------------------------------------------------------------------------------------------------------

    struct Scratch {
        T *pixels, *grad_pixels;  // sliding: [row][channel][lane], zeros around it; blocks: [position][channel][lane]
        T *map;                   // [column of a block][channel of a head][lane]: a row of out or of its gradient
        T *chosen, *place;        // pooled: [channel][lane] of a row of blocks: value or its gradient, place in the block
        T *attn, *grad_attn, *mixed, *grad_mixed;  // one vector of lanes: [position], [mixture][channel]
        T *sum_forms, *sum_mixture, *sum_weight;   // gradients by lane: [head][C][C], [position][M], [head][M][D][C]
    };

    i64 pixel_rows() const { return sliding ? std::min(strip_rows, H) + side - 1 : P; }

    std::size_t lay_out(T* base, Scratch& s) const {
        i64 used = 0;
        auto take = [&](T*& p, i64 n) { p = base + used, used += round_up(n, 64 / sizeof(T)); };
        const i64 image_size = pixel_rows() * C * pitch + 2 * L;
        take(s.pixels, image_size);
        take(s.grad_pixels, image_gradient ? image_size : 0);
        take(s.map, queries * D * lanes);
        take(s.chosen, pooled ? N * D * lanes : 0);
        take(s.place, pooled ? N * D * lanes : 0);
        take(s.attn, P * L);
        take(s.mixed, M * C * L);
        if (backward) {
            take(s.grad_attn, P * L);
            take(s.grad_mixed, M * C * L);
            take(s.sum_forms, N * C * C * L);
            take(s.sum_mixture, P * M * L);
            take(s.sum_weight, N * M * C * D * L);
        }
        return used * sizeof(T);
    }

    // -- one vector of queries ----------------------------------------------------------------------------------------

    struct Window {  // of one query row: the window's rows that take part
        i64 from, to;
    };

    struct Place {  // one vector of queries and what it sees
        const T* query;  // its pixels, channels `pitch` apart
        const T* keys;   // those of the window's first position
        i64 row, column; // from a position to the one below, and to the one beside it
        i64 v;
    };

    Place place(const T* pixels, i64 from, i64 y, i64 q, i64 v) const {
        if (!sliding) return {pixels + (y % side * side + q) * C * pitch + v * L, pixels + v * L, side * C * pitch, C * pitch, v};
        const T* row = pixels + (y - from) * C * pitch + v * L;  // the row of the window's first position
        return {row + back * C * pitch + margin, row + margin - back, C * pitch, 1, v};
    }

    static void load(const T* p, i64 pitch, Sums& x) {
        for (int c = 0; c < C; ++c) x[c] = S::load(p + c * pitch);
    }

    template <class F>
    INLINE void each_position(const Window& window, const Place& at, F&& f) const {  // f(position, its pixels)
        for (i64 a = window.from; a < window.to; ++a)
            for (i64 b = 0; b < side; ++b) f(a * side + b, b, at.keys + a * at.row + b * at.column);
    }

    // u = F^T x of the queries, so that a logit is u . key.
    void project(const T* form, const Place& at, Sums& u) const {
        Sums x;
        load(at.query, pitch, x);
        for (int k = 0; k < C; ++k) {
            u[k] = x[0] * form[k];
            for (int c = 1; c < C; ++c) u[k] += x[c] * form[c * C + k];
        }
    }

    // Weights of the window that sum to 1 -> s.attn.
    void attend(const Scratch& s, const T* form, const Window& window, const Place& at) const {
        const V lowest = S::fill(-std::numeric_limits<T>::infinity());
        Sums u;
        project(form, at, u);
        V high = lowest, total{};
        each_position(window, at, [&](i64 p, i64 b, const T* key) INLINE_LAMBDA {
            V score = u[0] * S::load(key);
            for (int c = 1; c < C; ++c) score += u[c] * S::load(key + c * pitch);
            if (edge[at.v]) score = S::pick(live[at.v * side + b], score, lowest);
            S::store(s.attn + p * L, score);
            high = S::larger(score, high);
        });
        each_position(window, at, [&](i64 p, i64, const T*) INLINE_LAMBDA {
            const V e = S::exponential(S::load(s.attn + p * L) - high);
            S::store(s.attn + p * L, e);
            total += e;
        });
        const V inverse = T(1) / total;
        each_position(window, at, [&](i64 p, i64, const T*) INLINE_LAMBDA {
            S::store(s.attn + p * L, S::load(s.attn + p * L) * inverse);
        });
    }

    // s.mixed[m][c] = sum over the window of attention * mixture * pixel.
    void mix(const Scratch& s, const Window& window, const Place& at) const {
        for (i64 m0 = 0; m0 < M; m0 += 4)
            with_constant<4>(std::min<i64>(4, M - m0), [&](auto n) INLINE_LAMBDA {
                constexpr int K = decltype(n)::value;
                V acc[K][C] = {};
                each_position(window, at, [&](i64 p, i64, const T* key) INLINE_LAMBDA {
                    const V attn = S::load(s.attn + p * L);
                    for (int c = 0; c < C; ++c) {
                        const V weighted = attn * S::load(key + c * pitch);
                        for (int m = 0; m < K; ++m) acc[m][c] += weighted * mixture[p * M + m0 + m];
                    }
                });
                for (int m = 0; m < K; ++m)
                    for (int c = 0; c < C; ++c) S::store(s.mixed + ((m0 + m) * C + c) * L, acc[m][c]);
            });
    }

    // map[d] = sum over i of weight[i][d] * mixed[i], i counting mixtures and channels.
    void expand(const Scratch& s, i64 n, T* to) const {
        for (i64 d0 = 0; d0 < D; d0 += kBlock)
            with_constant<kBlock>(std::min<i64>(kBlock, D - d0), [&](auto count) INLINE_LAMBDA {
                constexpr int K = decltype(count)::value;
                V acc[K] = {};
                for (i64 m = 0; m < M; ++m)
                    for (int c = 0; c < C; ++c) {
                        const V x = S::load_once(s.mixed + (m * C + c) * L);
                        const T* w = weight + ((m * N + n) * D + d0) * C + c;
                        for (int d = 0; d < K; ++d) acc[d] += x * w[d * C];
                    }
                for (int d = 0; d < K; ++d) S::store(to + (d0 + d) * lanes, acc[d]);
            });
    }

    // From the gradient of a head's output (at `grad`, channels `lanes` apart) to those of all that it came from.
    void differentiate(const Scratch& s, i64 n, const T* grad, const Window& window, const Place& at) const {
        for (i64 m = 0; m < M; ++m) {
            V acc[C] = {}, mixed[C];
            load(s.mixed + m * C * L, L, mixed);
            for (i64 d = 0; d < D; ++d) {
                const V g = S::load_once(grad + d * lanes);
                const T* w = weight + ((m * N + n) * D + d) * C;
                T* sums = s.sum_weight + ((n * M + m) * D + d) * C * L;
                for (int c = 0; c < C; ++c) {
                    acc[c] += g * w[c];
                    S::store(sums + c * L, S::load(sums + c * L) + g * mixed[c]);
                }
            }
            for (int c = 0; c < C; ++c) S::store(s.grad_mixed + (m * C + c) * L, acc[c]);
        }
        V delta{};  // sum of attn * grad attn
        each_position(window, at, [&](i64 p, i64, const T* key) INLINE_LAMBDA {
            Sums x;
            load(key, pitch, x);
            const V attn = S::load(s.attn + p * L);
            V total{};
            for (i64 m = 0; m < M; ++m) {
                V y = x[0] * S::load(s.grad_mixed + m * C * L);
                for (int c = 1; c < C; ++c) y += x[c] * S::load(s.grad_mixed + (m * C + c) * L);
                total += y * mixture[p * M + m];
                T* sums = s.sum_mixture + (p * M + m) * L;
                S::store(sums, S::load(sums) + attn * y);
            }
            S::store(s.grad_attn + p * L, total);
            delta += attn * total;
        });
        Sums u{}, sum{}, x;
        if (image_gradient) project(forms + n * C * C, at, u);
        each_position(window, at, [&](i64 p, i64, const T* key) INLINE_LAMBDA {
            const V attn = S::load(s.attn + p * L), score = attn * (S::load(s.grad_attn + p * L) - delta);
            for (int c = 0; c < C; ++c) sum[c] += score * S::load(key + c * pitch);
            if (!image_gradient) return;
            T* to = s.grad_pixels + (key - s.pixels);
            for (int c = 0; c < C; ++c) {
                V value{};
                for (i64 m = 0; m < M; ++m) value += S::load(s.grad_mixed + (m * C + c) * L) * mixture[p * M + m];
                S::store(to + c * pitch, S::load(to + c * pitch) + attn * value + score * u[c]);
            }
        });
        load(at.query, pitch, x);
        for (int c = 0; c < C; ++c)
            for (int k = 0; k < C; ++k) {
                T* sums = s.sum_forms + ((n * C + c) * C + k) * L;
                S::store(sums, S::load(sums) + x[c] * sum[k]);
                if (image_gradient) {
                    T* to = s.grad_pixels + (at.query - s.pixels) + c * pitch;
                    S::store(to, S::load(to) + sum[k] * forms[(n * C + c) * C + k]);
                }
            }
    }

    // -- one task -----------------------------------------------------------------------------------------------------

    static void task(const void* kernel, i64 index, char* memory) {
        const Stem& k = *static_cast<const Stem*>(kernel);
        Scratch s{};
        k.lay_out(reinterpret_cast<T*>(memory), s);
        const i64 b = index / k.strips, from = index % k.strips * k.strip_rows, until = std::min(k.H, from + k.strip_rows);
        if (k.backward) {
            std::fill_n(s.sum_forms, k.N * C * C * L, T(0));
            std::fill_n(s.sum_mixture, k.P * k.M * L, T(0));
            std::fill_n(s.sum_weight, k.N * k.M * C * k.D * L, T(0));
        }
        const i64 step = k.sliding ? until - from : k.side;
        double* partial = const_cast<double*>(k.partial.data()) + index * k.partials();
        for (i64 y = from; y < until; y += step) k.run_rows(s, b, y, std::min(until, y + step), partial);
        if (k.backward) k.keep_partial(s, partial);
    }

    // Query rows that share their packed pixels: a row of blocks, or a strip of sliding windows.
    void run_rows(const Scratch& s, i64 b, i64 from, i64 until, double* sums) const {
        const i64 first = sliding ? from - back : from, row_size = queries * C * pitch;
        const i64 rows = sliding ? until - from + side - 1 : side;
        for (i64 r = 0; r < rows; ++r) {
            T* to = s.pixels + r * row_size;
            if (first + r < 0 || first + r >= H)
                std::fill_n(to, row_size, T(0));
            else
                planes.pack(image, b, 0, first + r, C, to + margin, pitch, C * pitch, queries, W);
        }
        if (image_gradient) std::fill_n(s.grad_pixels, rows * row_size + 2 * L, T(0));
        const i64 blocks = (W + queries - 1) / queries;
        for (i64 n = 0; pooled && backward && n < N; ++n) {
            planes.pack(grad_out, b, n, from / side, D, s.chosen + n * D * lanes, lanes, 0, 1, blocks);
            planes.pack(index_read, b, n, from / side, D, s.place + n * D * lanes, lanes, 0, 1, blocks);
        }
        for (i64 y = from; y < until; ++y) {
            const i64 top = sliding ? y - back : from;  // the image's row of the window's first
            const Window window = {zero ? 0 : std::max<i64>(0, -top), zero ? side : std::min(side, H - top)};
            for (i64 n = 0; n < N; ++n) {
                if (backward && !pooled) planes.pack(grad_out, b, n, y, D, s.map, lanes, D * lanes, queries, W);
                for (i64 q = 0; q < queries; ++q)
                    for (i64 v = 0; v < vectors; ++v) {
                        const Place at = place(s.pixels, from, y, q, v);
                        attend(s, forms + n * C * C, window, at);
                        mix(s, window, at);
                        T* map = s.map + q * D * lanes + v * L;
                        if (!backward || pooled) expand(s, n, map);
                        if (backward && pooled) unpool(s, n, (y - from) * side + q, real[v * side + q], v, map);
                        if (backward) differentiate(s, n, map, window, at);
                    }
                if (!backward && pooled) pool(s, n, y - from, sums);
                if (!backward && !pooled) planes.unpack(s.map, lanes, D * lanes, b, n, y, D, out, queries, W);
            }
        }
        for (i64 n = 0; pooled && !backward && n < N; ++n) {
            planes.unpack(s.chosen + n * D * lanes, lanes, 0, b, n, from / side, D, out, 1, blocks);
            planes.unpack(s.place + n * D * lanes, lanes, 0, b, n, from / side, D, index, 1, blocks);
        }
        for (i64 y = from; image_gradient && y < until; ++y)
            planes.unpack(s.grad_pixels + (y - first) * row_size + margin, pitch, C * pitch, b, 0, y, C, grad_image, queries, W);
    }

    // A row of a head's output: the value of each block chosen so far and its place; sums and sums of squares.
    void pool(const Scratch& s, i64 n, i64 row, double* sums) const {
        const T* signs = reinterpret_cast<const T*>(call.signs);
        for (i64 c = n * D; c < (n + 1) * D; ++c) {
            V sum{}, squares{};
            for (i64 v = 0; v < vectors; ++v) {
                T *to = s.chosen + c * lanes + v * L, *at = s.place + c * lanes + v * L;
                V chosen = row ? S::load(to) : V{}, best = row ? S::load(at) : V{};
                for (i64 q = 0; q < queries; ++q) {
                    const Mask inside = real[v * side + q];
                    const V x = S::pick(inside, S::load(s.map + (q * D + c - n * D) * lanes + v * L), V{});
                    const V ranked = x * signs[c];
                    Mask larger = inside;  // a block's first pixel is always real
                    if (row + q) larger &= (ranked > chosen * signs[c]) | (ranked != ranked);  // NaN stays
                    chosen = S::pick(larger, x, chosen), best = S::pick(larger, S::fill(T(row * side + q)), best);
                    sum += x, squares += x * x;
                }
                S::store(to, chosen), S::store(at, best);
            }
            for (i64 l = 0; l < L; ++l) sums[c] += sum[l], sums[N * D + c] += squares[l];
        }
    }

    // The gradient of a head's output at a place of the block, from what left the pool; the output is at `map`.
    void unpool(const Scratch& s, i64 n, i64 position, const Mask& inside, i64 v, T* map) const {
        const T* slopes = reinterpret_cast<const T*>(call.slopes);
        for (i64 d = 0; d < D; ++d, map += lanes) {
            const i64 c = n * D + d, at = c * lanes + v * L;
            const V grad = S::load(map) * slopes[N * D + c] + slopes[c];
            const V peak = S::pick(S::load(s.place + at) == S::fill(T(position)), S::load(s.chosen + at), V{});
            S::store(map, S::pick(inside, grad + peak, V{}));
        }
    }

    void keep_partial(const Scratch& s, double* to) const {
        auto keep = [&](const T* sums, i64 n) {
            for (i64 e = 0; e < n; ++e) {
                T total = 0;
                for (i64 l = 0; l < L; ++l) total += sums[e * L + l];
                *to++ = total;
            }
        };
        keep(s.sum_forms, N * C * C);
        keep(s.sum_mixture, P * M);
        keep(s.sum_weight, N * M * D * C);
    }

    double total_of(i64 e) const {
        double total = 0;
        for (i64 t = 0; t < B * strips; ++t) total += partial[t * partials() + e];
        return total;
    }

    void keep_moments() const {
        double* to = reinterpret_cast<double*>(call.moments);
        const double count = double(B) * H * W;
        for (i64 c = 0; c < N * D; ++c) {
            const double mean = total_of(c) / count, variance = total_of(N * D + c) / count - mean * mean;
            to[c] = mean, to[N * D + c] = variance < 0 ? 0 : variance;
        }
    }

    void sum_partials() const {
        T *to_forms = reinterpret_cast<T*>(call.grad_forms), *to_mixture = reinterpret_cast<T*>(call.grad_mixture);
        T* to_weight = reinterpret_cast<T*>(call.grad_weight);
        for (i64 e = 0; e < partials(); ++e) {
            const double total = total_of(e);
            const i64 p = e - N * C * C, w = p - P * M;
            if (p < 0) {
                to_forms[e] = static_cast<T>(total);
            } else if (w < 0) {
                to_mixture[p] = static_cast<T>(total);
            } else {  // [head][M][D * C] -> [M][head][D * C]
                const i64 size = D * C, n = w / (M * size), m = w / size % M;
                to_weight[(m * N + n) * size + w % size] = static_cast<T>(total);
            }
        }
    }

    bool execute() {
        partial.resize(B * strips * partials());
        Scratch s{};
        const i64 flags = sliding + 2 * zero + 4 * backward + 8 * image_gradient + 16 * pooled;
        Job job{task, this, B * strips, lay_out(nullptr, s), {H, W, N, D, M, side, flags, strip_rows}};
        if (!run(job, call.threads, call.parallel)) return false;
        if (backward) sum_partials();
        if (pooled && !backward) keep_moments();
        return true;
    }
};

}  // namespace

// 0, or 1 where memory ran out. The maps are of type SASA_REAL.
extern "C" int sasa_stem(const void* call, std::size_t bytes, int backward) {
    using T = SASA_REAL;
    if (bytes != sizeof(StemCall)) return kOtherInterface;
    try {
        return Stem<T, kVectorBytes / sizeof(T)>(*static_cast<const StemCall*>(call), backward).execute() ? kDone : kNoMemory;
    } catch (const std::bad_alloc&) {
        return kNoMemory;
    }
}
