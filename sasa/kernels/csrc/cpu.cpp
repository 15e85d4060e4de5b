// Local attention on the CPU: forward and backward behind a plain C interface (kernels/cpu.py builds and calls it).
//
// Shapes: B batch, N heads, D head width, H x W map, K window side; a window reaches back = (K-1)/2 and ahead = K/2.
// Source: Ramachandran et al. 2019, equation 3.
//
// Lanes. G neighbouring heads of one image are handled together, interleaved: lane x*G + g of a row is head g at
// column x. A step of one column is then a step of G lanes, and G is chosen so that narrow maps fill the vectors too;
// at G = L each vector is one column of L heads, every load is aligned and no pair outside the map is computed.
// Packed rows. The map's rows are copied once into scratch as [row][channel][lane], with a zero gap between channels
// that serves as the halo on both sides. Reading any input strides, and writing any output strides, happens there only.
// Tiles. The unit of work is ROWS query rows x one vector of lanes: one load of a key row feeds up to ROWS multiply-adds.
// Relative logits are separable: q.r = R[i] + C[j], K + K numbers a pixel, added where a score is started.
// Backward. P and dS of the last few query rows wait in a ring, stored at the lane of their *key*, so that dK and dV are
// gathered by key row with the routine that computes P.V; nothing is scattered. One task owns G heads of one image and
// shares no output with another, so results are the same bits for every thread count; gradients of the embeddings are
// summed from one partial per image in fixed order.

#include <cmath>
#include <cstddef>
#include <limits>
#include <new>
#include <vector>

#include "packing.h"
#include "products.h"
#include "threads.h"

namespace {

constexpr int kMaxWindow = 13;

struct AttentionCall {  // one forward or backward call; cpu.py declares the same fields in the same order
    i64 batch, heads, width, height, columns, window, zero_border, threads;
    i64 parallel;  // address of GOMP_parallel of the OpenMP runtime that torch has loaded, or 0
    i64 query[6], key[6], value[6], out[6], lse[6], rel_row[4], rel_col[4];  // pointer, strides in elements
    i64 grad_out[6], grad_query[6], grad_key[6], grad_value[6], grad_row, grad_col;
};

// ---------------------------------------------------------------------------------------------------------------------
// The kernel

template <class T, int L>
struct Kernel {
    using S = Simd<T, L>;
    using V = typename S::V;
    using Mask = typename S::Mask;
    using P = Products<T, L>;
    using Step = typename P::Step;

    // Widest score block: its accumulators, one operand per row and one shared operand stay in registers. fp64 is for
    // checking gradients: it takes narrow blocks, which build faster.
    static constexpr int score_width(int rows) {
        return sizeof(T) == 8 ? 2 : std::min(7, (kRegisters - 1 - rows) / rows);
    }
    static constexpr int kChannels = sizeof(T) == 8 || kRegisters < 32 ? 2 : 4;  // of a block of a weighted sum

    struct Span {  // the offsets j that reach from lanes of a vector into the map
        int from, to;
    };

    AttentionCall call;
    bool backward, has_key, has_rel, zero;
    i64 B, N, D, H, W, group, groups, strips, strip_rows, tasks;
    int K, back, ahead, G, vectors;
    i64 lanes, pitch, plane, guard, query_slots, key_slots, score_slots;
    T scale;
    Packing<T, L> packing;
    Map<const T> query, key, value, grad_out, out_read;
    Map<T> out, lse, grad_query, grad_key, grad_value;
    std::vector<Span> reach, reached;  // by vector: of its queries to keys, of its keys to queries
    std::vector<Mask> live;            // [vector][j]: lanes of a real query whose key takes part
    std::vector<char> edge;            // by vector: some lane of `live` is false
    std::vector<T> partial;            // [image][head][D][K] gradients of the embeddings

    Kernel(const AttentionCall& c, T factor, bool with_backward) : call(c), backward(with_backward), scale(factor) {
        B = c.batch, N = c.heads, D = c.width, H = c.height, W = c.columns, K = c.window;
        back = (K - 1) / 2, ahead = K / 2;
        zero = c.zero_border, has_key = c.key[0], has_rel = c.rel_row[0];
        query = map_of<const T>(c.query), key = map_of<const T>(c.key), value = map_of<const T>(c.value);
        grad_out = map_of<const T>(c.grad_out), out_read = map_of<const T>(c.out);
        out = map_of<T>(c.out), lse = map_of<T>(c.lse), grad_query = map_of<T>(c.grad_query);
        grad_key = map_of<T>(c.grad_key), grad_value = map_of<T>(c.grad_value);
        G = heads_per_vector();
        packing = {W, G};
        groups = N / G, strips = 1, strip_rows = round_up(H, ROWS);
        if (!backward && B * groups < kEnoughTasks) {
            strip_rows = std::max<i64>(2 * ROWS, round_up((H * B * groups + kEnoughTasks - 1) / kEnoughTasks, ROWS));
            strips = (H + strip_rows - 1) / strip_rows;
        }
        tasks = B * groups * strips;
        vectors = vectors_of(G), lanes = i64(vectors) * L;
        guard = round_up(i64(ahead) * G, L);
        pitch = round_up(W * G + i64(ahead) * G, L);
        plane = round_up(lanes + i64(K - 1) * G, L);
        key_slots = std::min<i64>(H, ROWS + K - 1), score_slots = std::min<i64>(H, 2 * ROWS + K - 2);
        query_slots = backward ? round_up(score_slots, ROWS) : ROWS;
        reach.resize(vectors), reached.resize(vectors), live.resize(vectors * K), edge.resize(vectors);
        for (int v = 0; v < vectors; ++v) {
            reach[v] = span(v, G), reached[v] = {};
            const int first = v * L / G, last = std::min<int>(W - 1, (v * L + L - 1) / G);
            reached[v] = {std::max<int>(0, first + back - int(W) + 1), std::min(K, last + back + 1)};
            if (zero) reach[v] = {0, K};
            for (int j = 0; j < K; ++j) {
                for (int l = 0; l < L; ++l) {
                    const i64 x = (v * L + l) / G, at = x + j - back;
                    live[v * K + j][l] = -i64(x < W && (zero || (at >= 0 && at < W)));
                    if (!live[v * K + j][l] && j >= reach[v].from && j < reach[v].to) edge[v] = 1;
                }
            }
        }
    }

    // Constants, not the machine's: results must not depend on the number of threads.
    static constexpr i64 kEnoughTasks = 16;          // below it forward splits maps into strips
    static constexpr i64 kScratchBytes = 8 << 20;    // a thread's ring of P and dS; the largest measured shape has 2.5 MB

    int vectors_of(int g) const { return (W * g + L - 1) / L; }
    Span span(int v, int g) const {
        const int first = v * L / g, last = std::min<int>(W - 1, (v * L + L - 1) / g);
        return {std::max(0, back - last), std::min<int>(K, W + back - first)};
    }

    // The G of fewest offset vectors a head, among those that leave enough tasks and a modest scratch.
    int heads_per_vector() const {
        int best = 1;
        double best_cost = std::numeric_limits<double>::infinity();
        for (int g = 1; g <= L && N % g == 0; g *= 2) {
            const i64 ring = 2 * (2 * ROWS + K - 2) * K * K * W * g * i64(sizeof(T));
            if (g > 1 && (B * N / g < kEnoughTasks / 2 || ring > kScratchBytes)) break;
            double cost = 0;
            for (int v = 0; v < vectors_of(g); ++v) cost += span(v, g).to - span(v, g).from;
            if (cost / g < best_cost) best = g, best_cost = cost / g;
        }
        return best;
    }

    // -- scratch ------------------------------------------------------------------------------------------------------

    struct Scratch {
        T *query, *grad, *key, *value, *nothing, *row, *rows, *lse, *delta, *row_logits, *col_logits;
        T *tile, *tile_query, *tile_grad, *embedding, *grad_embedding, *grad_row, *grad_col, *prob, *grad_score;
    };

    std::size_t lay_out(T* base, Scratch& s) const {
        i64 used = guard;
        auto take = [&](T*& p, i64 n) {
            p = base + used;
            used += round_up(n, 64 / sizeof(T)) + guard;
        };
        const i64 packed = D * pitch, window = i64(K) * K;
        take(s.query, query_slots * packed + lanes);
        take(s.key, has_key ? key_slots * packed + lanes : 0);
        take(s.value, key_slots * packed + lanes);
        take(s.nothing, zero ? packed + lanes : 0);
        take(s.rows, ROWS * packed + lanes);
        take(s.lse, ROWS * lanes);
        take(s.row_logits, ROWS * K * L);
        take(s.col_logits, ROWS * K * L);
        take(s.tile, (ROWS + K - 1) * K * ROWS * L);
        take(s.tile_query, D * ROWS * L);
        take(s.embedding, has_rel ? D * K * L : 0);
        if (backward) {
            take(s.grad, query_slots * packed + lanes);
            take(s.row, packed + lanes);
            take(s.delta, ROWS * lanes);
            take(s.tile_grad, D * ROWS * L);
            take(s.grad_embedding, D * K * L);
            take(s.grad_row, ROWS * K * lanes);
            take(s.grad_col, ROWS * K * lanes);
            take(s.prob, score_slots * window * plane);
            take(s.grad_score, score_slots * window * plane);
        }
        return used * sizeof(T);
    }

    template <bool RING>
    void weigh_channels(const Step* steps, int count, int rows, i64 from, i64 until, const V* factor, T* to) const {
        const i64 to_r = D * pitch, a_r = i64(K) * plane;
        i64 c = from;
        for (; c + kChannels <= until; c += kChannels)
            P::template weigh<kChannels, RING>(steps, count, rows, c, factor, a_r, plane, to, to_r, pitch);
        for (; c < until; ++c) P::template weigh<1, RING>(steps, count, rows, c, factor, a_r, plane, to, to_r, pitch);
    }

    // -- one tile -----------------------------------------------------------------------------------------------------

    // Scores of a tile lie at [s][j][row] vectors: s counts the key rows y0 - back + s, so row r sees s = r .. r+K-1.
    struct Tile {
        int v, rows, s_from, s_to;  // vector; query rows; key rows that take part
        bool edge, coarse;  // some lane takes no part; log-sum-exp is too large for its last bit to be small
        Span reach;
        const T *key[2 * kMaxWindow], *value[2 * kMaxWindow];  // by s, at this vector's leftmost offset
        T *prob[ROWS], *grad_score[ROWS];                      // ring rows, at this vector
        V lse[ROWS], delta[ROWS];
    };

    // Packed rows of one vector -> [channel][row] vectors, whose strides the compiler knows.
    void copy_to_tile(const T* rows, int count, T* to) const {
        for (int r = 0; r < count; ++r)
            for (i64 c = 0; c < D; ++c) S::store(to + (c * ROWS + r) * L, S::load(rows + (r * D + c) * pitch));
    }

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

    // f(rows, width, s, first row, first offset) for blocks of the tile that fit the registers.
    template <class F>
    INLINE void each_block(const Tile& t, F&& f) const {
        for (int s = t.s_from; s < t.s_to; ++s) {
            const int first = std::max(0, s - K + 1);
            with_constant<ROWS>(std::min(t.rows, s + 1) - first, [&](auto r) INLINE_LAMBDA {
                constexpr int R = decltype(r)::value, width = score_width(R);
                for (int j = t.reach.from; j < t.reach.to;) {
                    const int left = t.reach.to - j, n = left <= width ? left : std::min(width, (left + 1) / 2);
                    with_constant<width>(n, [&](auto w) INLINE_LAMBDA { f(r, w, s, first, j); });
                    j += n;
                }
            });
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

    // f(rows, s, first row) for the key rows of a tile.
    template <class F>
    INLINE void each_key_row(const Tile& t, F&& f) const {
        for (int s = t.s_from; s < t.s_to; ++s) {
            const int first = std::max(0, s - K + 1);
            with_constant<ROWS>(std::min(t.rows, s + 1) - first, [&](auto r) INLINE_LAMBDA { f(r, s, first); });
        }
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
        weigh_channels<false>(steps, list_steps(scratch, t, t.value, steps), t.rows, 0, D, inverse, out_rows);
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

    void backward_tile(const Scratch& scratch, const Tile& t, T* out_rows) const {
        relative_logits(scratch);
        scores(scratch, t);
        const i64 next = plane + G, up = i64(K) * plane;  // ring: one offset on, one key row on
        each_key_row(t, [&](auto rows, int s, int first) INLINE_LAMBDA {  // scores -> P
            constexpr int R = decltype(rows)::value;
            T *p = scratch.tile + ((s * K + t.reach.from) * ROWS + first) * L, *ring[R];
            V lse[R];
            for (int r = 0; r < R; ++r) {
                lse[r] = t.lse[first + r];
                ring[r] = t.prob[first + r] + (s - first - r) * up + t.reach.from * next - back * G;
            }
            for (int j = t.reach.from; j < t.reach.to; ++j, p += ROWS * L)
                for (int r = 0; r < R; ++r) {
                    const V e = S::exponential(S::load(p + r * L) - lse[r]);
                    S::store(p + r * L, e);
                    S::store(ring[r], e);
                    ring[r] += next;
                }
        });
        if (t.coarse) normalise(scratch, t);
        each_block(t, [&](auto rows, auto width, int s, int first, int j0) INLINE_LAMBDA {  // P -> dS
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
        Step steps[2 * kMaxWindow + 1];
        const int count = has_key ? list_steps(scratch, t, t.key, steps) : 0;
        V ones[ROWS];
        for (V& one : ones) one = S::fill(1);
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
                        f(scratch.tile + ((s * K + j) * ROWS + r) * L, t.prob[r] + at);
                    }
            };
            each([&](T* p, T*) { total += S::load(p); });
            for (int l = 0; l < L; ++l) total[l] = total[l] > 0 ? total[l] : 1;  // a lane that takes no part
            each([&](T* p, T* ring) {
                S::store(p, S::load(p) / total);
                S::store(ring, S::load(p));
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

    // -- one task -----------------------------------------------------------------------------------------------------

    static void task(const void* kernel, i64 index, char* memory) {
        const Kernel& k = *static_cast<const Kernel*>(kernel);
        const i64 strip = index % k.strips, g = index / k.strips % k.groups, b = index / k.strips / k.groups;
        const i64 from = strip * k.strip_rows;
        Scratch s{};
        k.lay_out(reinterpret_cast<T*>(memory), s);
        k.run_rows(s, b, g * k.G, from, std::min(k.H, from + k.strip_rows));
        S::end_streams();
    }

    void run_rows(const Scratch& s, i64 b, i64 n, i64 from, i64 until) const {
        if (has_rel) copy_embeddings(s, n);
        if (backward && has_rel) std::fill_n(s.grad_embedding, D * K * L, T(0));
        i64 packed = std::max<i64>(0, from - back), gathered = 0;
        for (i64 y0 = from; y0 < until; y0 += ROWS) {
            const int rows = std::min<i64>(ROWS, until - y0);
            for (; packed < std::min(H, y0 + rows + ahead); ++packed) {
                const i64 slot = packed % key_slots * D * pitch;
                if (has_key) packing.pack(key, b, n, packed, D, 1, s.key + slot, pitch);
                packing.pack(value, b, n, packed, D, 1, s.value + slot, pitch);
            }
            T* q = s.query + y0 % query_slots * D * pitch;
            for (int r = 0; r < rows; ++r) packing.pack(query, b, n, y0 + r, D, scale, q + r * D * pitch, pitch);
            const bool coarse = backward && prepare_rows(s, b, n, y0, rows);
            for (int v = 0; v < vectors; ++v) {
                const Tile t = tile_at(s, y0, rows, v, coarse);
                copy_to_tile(q + v * L, rows, s.tile_query);
                if (backward) copy_to_tile(s.grad + y0 % query_slots * D * pitch + v * L, rows, s.tile_grad);
                if (backward)
                    backward_tile(s, t, s.rows + v * L);
                else
                    forward_tile(s, t, s.rows + v * L, s.lse + v * L);
            }
            for (int r = 0; r < rows; ++r) {
                const Map<T>& to = backward ? grad_query : out;
                packing.unpack(s.rows + r * D * pitch, pitch, b, n, y0 + r, D, backward ? scale : T(1), to);
                if (!backward) packing.unpack(s.lse + r * lanes, lanes, b, n, y0 + r, 1, 1, lse);
            }
            if (!backward) continue;
            if (has_rel) add_embedding_gradients(s, y0, rows);
            while (gathered < H && (y0 + rows == H || gathered + ROWS + back <= y0 + rows)) {
                gather(s, b, n, gathered, std::min<i64>(ROWS, H - gathered));
                gathered += ROWS;
            }
        }
        if (backward && has_rel) keep_partial(s, b, n);
    }

    Tile tile_at(const Scratch& s, i64 y0, int rows, int v, bool coarse) const {
        Tile t;
        const i64 at = i64(v) * L;
        t.v = v, t.rows = rows, t.edge = edge[v], t.coarse = coarse, t.reach = reach[v];
        t.s_from = zero ? 0 : std::max<i64>(0, back - y0);
        t.s_to = zero ? rows + K - 1 : std::min<i64>(rows + K - 1, H - y0 + back);
        for (int i = t.s_from; i < t.s_to; ++i) {
            const i64 y = y0 - back + i, slot = y % key_slots * D * pitch;
            const bool inside = y >= 0 && y < H;
            t.key[i] = (inside ? s.key + slot : s.nothing) + at - back * G;
            t.value[i] = (inside ? s.value + slot : s.nothing) + at - back * G;
        }
        if (!backward) return t;
        for (int r = 0; r < rows; ++r) {
            const i64 slot = (y0 + r) % score_slots * K * K * plane;
            t.prob[r] = s.prob + slot + at, t.grad_score[r] = s.grad_score + slot + at;
            t.lse[r] = S::load(s.lse + r * lanes + at), t.delta[r] = S::load(s.delta + r * lanes + at);
        }
        return t;
    }

    // Gradients of the output, log-sum-exp, and delta = sum of out * grad_out, the same as the sum of P * dP. True where
    // a log-sum-exp is large.
    bool prepare_rows(const Scratch& s, i64 b, i64 n, i64 y0, int rows) const {
        const Map<const T> lse_read = map_of<const T>(call.lse);
        V largest = {};
        for (int r = 0; r < rows; ++r) {
            T* grad = s.grad + (y0 % query_slots + r) * D * pitch;
            packing.pack(grad_out, b, n, y0 + r, D, 1, grad, pitch);
            packing.pack(out_read, b, n, y0 + r, D, 1, s.row, pitch);
            packing.pack(lse_read, b, n, y0 + r, 1, 1, s.lse + r * lanes, lanes);
            for (i64 at = 0; at < lanes; at += L) {
                V total = {}, poison = {};
                for (i64 c = 0; c < D; ++c) {
                    const V g = S::load(grad + c * pitch + at);
                    total += g * S::load(s.row + c * pitch + at);
                    poison += g * T(0);  // NaN where g is not finite: so is every P * dP then
                }
                total += poison;
                S::store(s.delta + r * lanes + at, total);
                const V log_sum = S::load(s.lse + r * lanes + at);
                largest = S::larger(S::larger(log_sum, -log_sum), largest);
                // An infinite one means that the softmax was NaN.
                S::store(s.lse + r * lanes + at, log_sum + log_sum * T(0));
            }
        }
        bool coarse = false;
        for (int l = 0; l < L; ++l) coarse |= largest[l] > 64;
        return coarse;
    }

    // dV and dK of key rows y0 .. y0+rows-1, from the ring.
    void gather(const Scratch& s, i64 b, i64 n, i64 y0, int rows) const {
        V ones[ROWS];
        for (V& one : ones) one = S::fill(1);
        for (int part = 0; part < (has_key ? 2 : 1); ++part) {
            const T *weights = part ? s.grad_score : s.prob, *of = part ? s.query : s.grad;
            for (int v = 0; v < vectors; ++v) {
                const i64 at = i64(v) * L;
                const Span j = reached[v];
                Step steps[2 * kMaxWindow];
                int count = 0;
                for (i64 y = std::max<i64>(0, y0 - ahead); y < std::min<i64>(H, y0 + rows + back); ++y) {
                    const int i = y0 - y + back;  // the offset of the tile's first row in the window of row y
                    const int first = std::max(0, -i), end = std::min(rows, K - i);
                    steps[count++] = {weights + (y % score_slots * K * K + i * K + j.from) * plane + at,
                                      of + y % query_slots * D * pitch + at - (j.from - back) * G,
                                      pitch, -G, j.to - j.from, first, end - first};
                }
                weigh_channels<true>(steps, count, rows, 0, D, ones, s.rows + at);
            }
            for (int r = 0; r < rows; ++r)
                packing.unpack(s.rows + r * D * pitch, pitch, b, n, y0 + r, D, 1, part ? grad_key : grad_value);
        }
    }

    // -- embeddings: [channel][i][lane], channels of the first half by row offset, of the second by column offset --------

    void copy_embeddings(const Scratch& s, i64 n) const {
        const i64 half = D / 2;
        for (i64 c = 0; c < D; ++c) {
            const i64* f = c < half ? call.rel_row : call.rel_col;
            const T* from = reinterpret_cast<const T*>(f[0]) + c % half * f[2];
            for (int i = 0; i < K; ++i)
                for (int l = 0; l < L; ++l) s.embedding[(c * K + i) * L + l] = from[(n + l % G) * f[1] + i * f[3]];
        }
    }

    void add_embedding_gradients(const Scratch& s, i64 y0, int rows) const {
        const i64 half = D / 2;
        for (int part = 0; part < 2; ++part) {
            const T* sums = part ? s.grad_col : s.grad_row;
            for (i64 c = part * half; c < part * half + half;) {
                const int channels = std::min<i64>(ROWS, part * half + half - c);
                with_constant<ROWS>(channels, [&](auto m) INLINE_LAMBDA {
                    constexpr int C = decltype(m)::value, width = score_width(C);
                    for (int i0 = 0; i0 < K; i0 += width) {
                        with_constant<width>(std::min(width, K - i0), [&](auto w) INLINE_LAMBDA {
                            constexpr int J = decltype(w)::value;
                            T* to = s.grad_embedding + (c * K + i0) * L;
                            V acc[C][J];
                            for (int a = 0; a < C; ++a)
                                for (int i = 0; i < J; ++i) acc[a][i] = S::load(to + (a * K + i) * L);
                            for (int r = 0; r < rows; ++r)
                                P::multiply(acc, s.query + ((y0 % query_slots + r) * D + c) * pitch, pitch, L,
                                         sums + (r * K + i0) * lanes, lanes, L, vectors);
                            for (int a = 0; a < C; ++a)
                                for (int i = 0; i < J; ++i) S::store(to + (a * K + i) * L, acc[a][i]);
                        });
                    }
                });
                c += channels;
            }
        }
    }

    void keep_partial(const Scratch& s, i64 b, i64 n) const {
        for (int g = 0; g < G; ++g) {
            T* to = const_cast<T*>(partial.data()) + (b * N + n + g) * D * K;
            for (i64 e = 0; e < D * K; ++e) {
                T total = 0;
                for (int l = g; l < L; l += G) total += s.grad_embedding[e * L + l];
                to[e] = total;
            }
        }
    }

    void sum_partials() const {
        const i64 size = N * (D / 2) * K;
        T* to[2] = {reinterpret_cast<T*>(call.grad_row), reinterpret_cast<T*>(call.grad_col)};
        for (i64 e = 0; e < 2 * size; ++e) {
            const i64 n = e / (D * K), rest = e % (D * K), part = rest / (D / 2 * K);
            double total = 0;
            for (i64 b = 0; b < B; ++b) total += partial[b * 2 * size + e];
            to[part][n * (D / 2) * K + rest % (D / 2 * K)] = static_cast<T>(total);
        }
    }

    bool execute() {
        if (backward && has_rel) partial.resize(B * N * D * K);
        Scratch s{};
        Job job{task, this, tasks, lay_out(nullptr, s), {D, H, W, K, G, backward, has_key, has_rel, zero}};
        if (!run(job, call.threads, call.parallel)) return false;
        if (backward && has_rel) sum_partials();
        return true;
    }
};

}  // namespace

// 0, or 1 where memory ran out. The maps are of type SASA_REAL.
extern "C" int sasa_local_attention(const void* call, std::size_t bytes, double scale, int backward) {
    using T = SASA_REAL;
    if (bytes != sizeof(AttentionCall)) return kOtherInterface;
    try {
        Kernel<T, kVectorBytes / sizeof(T)> kernel(*static_cast<const AttentionCall*>(call), static_cast<T>(scale), backward);
        return kernel.execute() ? kDone : kNoMemory;
    } catch (const std::bad_alloc&) {
        return kNoMemory;
    }
}
