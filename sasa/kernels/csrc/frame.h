// What the parts of local attention's kernel share: the sizes of a call, the scratch memory, the tile.

#pragma once

#include <cstddef>
#include <limits>
#include <vector>

#include "packing.h"
#include "products.h"
#include "projection.h"

namespace {

constexpr int kMaxWindow = 13;
using T = SASA_REAL;
constexpr int L = kVectorBytes / sizeof(T);

struct AttentionCall {  // one forward or backward call; cpu.py declares the same fields in the same order
    i64 batch, heads, width, height, columns, window, zero_border, pooled, threads;
    i64 parallel;  // address of GOMP_parallel of the OpenMP runtime that torch has loaded, or 0
    i64 query[6], key[6], value[6], out[6], lse[6], rel_row[4], rel_col[4];  // pointer, strides in elements
    i64 grad_out[6], grad_query[6], grad_key[6], grad_value[6], grad_row, grad_col;
    i64 input[6], weight, inputs, parts;  // the layer's input and its projections, where those are made here
    i64 kept;  // forward keeps them here, backward has them from here: see Frame::kept_row
};

struct Frame {
    using S = Simd<T, L>;
    using V = S::V;
    using Mask = S::Mask;
    using P = Products<T, L>;
    using Step = P::Step;

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
    bool backward, projected, has_key, has_rel, zero, pooled;
    i64 B, N, D, H, W, group, groups, strips, strip_rows, tasks;
    int K, back, ahead, G, vectors;
    i64 lanes, pitch, plane, guard, query_slots, key_slots, score_slots, pair_slots;
    T scale;
    T* kept;
    Packing<T, L> packing, pooled_packing;
    Map<const T> input, query, key, value, grad_out, out_read;
    Map<T> out, lse, grad_query, grad_key, grad_value;
    std::vector<Span> reach, reached;  // by vector: of its queries to keys, of its keys to queries
    std::vector<Mask> live;            // [vector][j]: lanes of a real query whose key takes part
    std::vector<char> edge;            // by vector: some lane of `live` is false
    std::vector<T> partial;            // [image][head][D][K] gradients of the embeddings

    Frame(const AttentionCall& c, T factor, bool with_backward) : call(c), backward(with_backward), scale(factor) {
        B = c.batch, N = c.heads, D = c.width, H = c.height, W = c.columns, K = c.window;
        back = (K - 1) / 2, ahead = K / 2;
        zero = c.zero_border, pooled = c.pooled, projected = c.weight, kept = reinterpret_cast<T*>(c.kept);
        has_rel = c.rel_row[0], has_key = projected || kept ? c.parts == 3 : c.key[0];
        query = map_of<const T>(c.query), key = map_of<const T>(c.key), value = map_of<const T>(c.value);
        input = map_of<const T>(c.input), grad_out = map_of<const T>(c.grad_out), out_read = map_of<const T>(c.out);
        out = map_of<T>(c.out), lse = map_of<T>(c.lse), grad_query = map_of<T>(c.grad_query);
        grad_key = map_of<T>(c.grad_key), grad_value = map_of<T>(c.grad_value);
        G = heads_per_vector();
        packing = {W, G}, pooled_packing = {W / 2, G};
        groups = N / G, strips = 1, strip_rows = round_up(H, ROWS);
        // Strips that lie side by side project the rows of their borders twice: no more of them than threads need. Which
        // strip a row is in changes none of its bits.
        const i64 enough = projected ? 2 * call.threads : kEnoughTasks;
        if (!backward && B * groups < enough) {
            strip_rows = std::max<i64>(2 * ROWS, round_up((H * B * groups + enough - 1) / enough, ROWS));
            strips = (H + strip_rows - 1) / strip_rows;
        }
        tasks = B * groups * strips;
        vectors = vectors_of(G), lanes = i64(vectors) * L;
        guard = round_up(i64(ahead) * G, L);
        pitch = round_up(W * G + i64(ahead) * G, L);
        plane = round_up(lanes + i64(K - 1) * G, L);
        key_slots = std::min<i64>(H, ROWS + K - 1), score_slots = std::min<i64>(H, 2 * ROWS + K - 2);
        query_slots = backward ? round_up(score_slots, ROWS) : ROWS;
        pair_slots = round_up(ROWS + K / 2 + 1, 2);
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

    // Constants, not the machine's: results must not depend on the number of threads, and G can change their last bits.
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

    // Row y of a part that is kept for backward: [image][heads / G][row][part][channel][lane], without gaps.
    T* kept_row(i64 b, i64 n, i64 y, i64 part) const {
        return kept + (((b * groups + n / G) * H + y) * call.parts + part) * D * W * G;
    }

    // -- scratch ------------------------------------------------------------------------------------------------------

    struct Scratch {
        T *query, *grad, *key, *value, *nothing, *row, *rows, *lse, *delta, *row_logits, *col_logits;
        T *tile, *tile_pair, *tile_query, *tile_grad, *embedding, *grad_embedding, *grad_row, *grad_col, *prob, *grad_score;
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
        if (pooled) take(s.tile_pair, (ROWS + K - 1) * K * ROWS * L);
        if (backward || pooled) take(s.row, packed + lanes);
        if (backward) {
            take(s.grad, (pooled ? pair_slots : query_slots) * packed + lanes);
            take(s.delta, ROWS * lanes);
            take(s.tile_grad, D * ROWS * L);
            take(s.grad_embedding, D * K * L);
            take(s.grad_row, ROWS * K * lanes);
            take(s.grad_col, ROWS * K * lanes);
            take(s.prob, (pooled ? pair_slots * (window + K) : score_slots * window) * plane);
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
        T *prob[ROWS], *grad_score[ROWS];  // ring rows, at this vector; pooled, `prob` is by pair
        V lse[ROWS], delta[ROWS];
    };

    // Packed rows of one vector -> [channel][row] vectors, whose strides the compiler knows.
    void copy_to_tile(const T* rows, int count, T* to) const {
        for (int r = 0; r < count; ++r)
            for (i64 c = 0; c < D; ++c) S::store(to + (c * ROWS + r) * L, S::load(rows + (r * D + c) * pitch));
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

    // f(rows, s, first row) for the key rows of a tile.
    template <class F>
    INLINE void each_key_row(const Tile& t, F&& f) const {
        for (int s = t.s_from; s < t.s_to; ++s) {
            const int first = std::max(0, s - K + 1);
            with_constant<ROWS>(std::min(t.rows, s + 1) - first, [&](auto r) INLINE_LAMBDA { f(r, s, first); });
        }
    }
};

}  // namespace
