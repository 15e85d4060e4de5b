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
// Or they are made there from the layer's input, and kept for backward as they are: see projection.h.
// Tiles. The unit of work is ROWS query rows x one vector of lanes: one load of a key row feeds up to ROWS multiply-adds.
// Relative logits are separable: q.r = R[i] + C[j], K + K numbers a pixel, added where a score is started.
// Backward. P and dS of the last few query rows wait in a ring, stored at the lane of their *key*, so that dK and dV are
// gathered by key row with the routine that computes P.V; nothing is scattered. One task owns G heads of one image and
// shares no output with another, so results are the same bits for every thread count; gradients of the embeddings are
// summed from one partial per image in fixed order.
// The average pool of a layer with stride 2 is computed here too: see pairs.h.
// Parts: frame.h sizes and scratch, tiles.h the arithmetic of a tile, packing.h and projection.h rows in and out, this
// file the tasks.


#include <new>
#include <optional>

#include "threads.h"
#include "tiles.h"

namespace {

struct Kernel : Tiles {
    using Tiles::Tiles;

    std::optional<Projection<T, L>> projection;

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

    // Rows y .. y+count-1 of a part (query, key or value) into its slots: read, or made from the input. What is made is
    // kept for backward, if at all, by the task whose rows from .. until-1 they are.
    void fill(T* to, i64 slots, const Map<const T>& map, i64 part, T factor, i64 b, i64 n, i64 y, i64 count, i64 from,
              i64 until) const {
        auto slot = [&](i64 at) { return to + at % slots * D * pitch; };
        if (projected) projection->rows(part, N, n, input, b, y, count, W, slot, pitch);
        for (; count > 0; ++y, --count) {
            if (!projected && !kept) {
                packing.pack(map, b, n, y, D, factor, slot(y), pitch);
            } else if (kept && (backward || (y >= from && y < until))) {
                T *row = slot(y), *other = kept_row(b, n, y, part);
                for (i64 c = 0; c < D; ++c, row += pitch, other += W * G)
                    backward ? S::copy(other, row, W * G) : S::copy_out(row, other, W * G);
            }
        }
    }

    void run_rows(const Scratch& s, i64 b, i64 n, i64 from, i64 until) const {
        if (has_rel) copy_embeddings(s, n);
        if (backward && has_rel) std::fill_n(s.grad_embedding, D * K * L, T(0));
        i64 packed = std::max<i64>(0, from - back), gathered = 0;
        for (i64 y0 = from; y0 < until; y0 += ROWS) {
            const int rows = std::min<i64>(ROWS, until - y0);
            const i64 next = std::min(H, y0 + rows + ahead) - packed;
            fill(s.query, query_slots, query, 0, scale, b, n, y0, rows, y0, until);
            if (has_key) fill(s.key, key_slots, key, 1, 1, b, n, packed, next, from, until);
            fill(s.value, key_slots, value, has_key ? 2 : 1, 1, b, n, packed, next, from, until);
            packed += next;
            const T* q = s.query + y0 % query_slots * D * pitch;
            const bool coarse = backward && prepare_rows(s, b, n, y0, rows);
            for (int v = 0; v < vectors; ++v) {
                Tile t = tile_at(s, y0, rows, v, coarse);
                copy_to_tile(q + v * L, rows, s.tile_query);
                if (backward) {
                    const i64 slot = pooled ? y0 / 2 % pair_slots : y0 % query_slots;
                    copy_to_tile(s.grad + slot * D * pitch + v * L, pooled ? rows / 2 : rows, s.tile_grad);
                }
                if (backward)
                    backward_tile(s, t, s.rows + v * L);
                else
                    forward_tile(s, t, s.rows + v * L, s.lse + v * L);
            }
            for (int r = 0; r < rows; ++r) {
                const Map<T>& to = backward ? grad_query : out;
                if (backward || !pooled)
                    packing.unpack(s.rows + r * D * pitch, pitch, b, n, y0 + r, D, backward ? scale : T(1), to);
                else if (r % 2 == 0)
                    unpack_pooled(s, s.rows + r / 2 * D * pitch, b, n, (y0 + r) / 2);
                if (!backward && lse.p) packing.unpack(s.lse + r * lanes, lanes, b, n, y0 + r, 1, 1, lse);
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
            t.grad_score[r] = s.grad_score + slot + at, t.lse[r] = S::load(s.lse + r * lanes + at);
            if (pooled) {
                t.prob[r / 2] = s.prob + (y0 + r) / 2 % pair_slots * (K + 1) * K * plane + at;
            } else {
                t.prob[r] = s.prob + slot + at, t.delta[r] = S::load(s.delta + r * lanes + at);
            }
        }
        return t;
    }

    // Gradients of the output, log-sum-exp, and delta = sum of out * grad_out, the same as the sum of P * dP. True where
    // a log-sum-exp is large.
    bool prepare_rows(const Scratch& s, i64 b, i64 n, i64 y0, int rows) const {
        const Map<const T> lse_read = map_of<const T>(call.lse);
        V largest = {};
        for (int r = 0; r < rows; ++r) {
            packing.pack(lse_read, b, n, y0 + r, 1, 1, s.lse + r * lanes, lanes);
            for (i64 at = 0; at < lanes; at += L) {
                const V log_sum = S::load(s.lse + r * lanes + at);
                largest = S::larger(S::larger(log_sum, -log_sum), largest);
                // An infinite one means that the softmax was NaN.
                S::store(s.lse + r * lanes + at, log_sum + log_sum * T(0));
            }
            if (!pooled)
                prepare_gradient(s, b, n, y0, r);
            else if (r % 2 == 0)
                spread_row(s, b, n, (y0 + r) / 2, s.grad + (y0 + r) / 2 % pair_slots * D * pitch);
        }
        bool coarse = false;
        for (int l = 0; l < L; ++l) coarse |= largest[l] > 64;
        return coarse;
    }

    void prepare_gradient(const Scratch& s, i64 b, i64 n, i64 y0, int r) const {
        T* grad = s.grad + (y0 % query_slots + r) * D * pitch;
        packing.pack(grad_out, b, n, y0 + r, D, 1, grad, pitch);
        packing.pack(out_read, b, n, y0 + r, D, 1, s.row, pitch);
        for (i64 at = 0; at < lanes; at += L) {
            V total = {}, poison = {};
            for (i64 c = 0; c < D; ++c) {
                const V g = S::load(grad + c * pitch + at);
                total += g * S::load(s.row + c * pitch + at);
                poison += g * T(0);  // NaN where g is not finite: so is every P * dP then
            }
            S::store(s.delta + r * lanes + at, total + poison);
        }
    }

    // dV and dK of key rows y0 .. y0+rows-1, from the ring.
    void gather(const Scratch& s, i64 b, i64 n, i64 y0, int rows) const {
        V ones[ROWS];
        for (V& one : ones) one = S::fill(1);
        for (int part = 0; part < (has_key ? 2 : 1); ++part) {
            const T *weights = part ? s.grad_score : s.prob, *of = part ? s.query : s.grad;
            const int step = pooled && part == 0 ? 2 : 1, window = K + step - 1;  // rows that a row of the ring is for
            const i64 ring = step == 2 ? pair_slots : score_slots, of_slots = step == 2 ? pair_slots : query_slots;
            for (int v = 0; v < vectors; ++v) {
                const i64 at = i64(v) * L;
                const Span j = reached[v];
                Step steps[2 * kMaxWindow];
                int count = 0;
                for (i64 y = std::max<i64>(0, y0 - ahead) / step; y * step < std::min<i64>(H, y0 + rows + back); ++y) {
                    const int i = y0 - y * step + back;  // the offset of the tile's first row in the window of row y
                    const int first = std::max(0, -i), end = std::min(rows, window - i);
                    steps[count++] = {weights + (y % ring * window * K + i * K + j.from) * plane + at,
                                      of + y % of_slots * D * pitch + at - (j.from - back) * G,
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
        if (projected)
            projection.emplace(reinterpret_cast<const T*>(call.weight), call.parts, N, D, call.inputs, G, scale);
        if (backward && has_rel) partial.resize(B * N * D * K);
        Scratch s{};
        Job job{task, this, tasks, lay_out(nullptr, s), {D, H, W, K, G, backward + 2 * pooled, has_key, has_rel, zero}};
        if (!run(job, call.threads, call.parallel)) return false;
        if (backward && has_rel) sum_partials();
        return true;
    }
};

}  // namespace

// 0, or 1 where memory ran out. The maps are of type SASA_REAL.
extern "C" int sasa_local_attention(const void* call, std::size_t bytes, double scale, int backward) {
    if (bytes != sizeof(AttentionCall)) return kOtherInterface;
    try {
        Kernel kernel(*static_cast<const AttentionCall*>(call), static_cast<T>(scale), backward);
        return kernel.execute() ? kDone : kNoMemory;
    } catch (const std::bad_alloc&) {
        return kNoMemory;
    }
}
