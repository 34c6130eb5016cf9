// MaskedScores (mask.cuh) for accumulators of wgmma: window, segments, images, spans, softcap and
// bias. The producer warp walks over the tiles (MaskedScores::KeyTiles and QueryTiles want a whole
// warp) and passes each as a tile_word() to the consumers, which then
//   shape_scores   softcap and bias; softmax multiplies by score_unit() afterwards
//   hide_scores    -inf where masked; not needed where whole_tile()
// A thread holds two rows (halves), lane / 4 and 8 below, of which it has columns
// col0 + 8 n + 2 (lane % 4) + e. Rows are queries and columns keys; kTransposed: the reverse.
#pragma once

#include "attention/mask.cuh"

namespace vlmkernels {

// A tile as a word of shared memory; negative: none.
__device__ inline int tile_word(MaskedScores::Tile tile) {
    return tile.index < 0 ? -1 : tile.index * 2 + tile.is_whole;
}
__device__ inline int tile_index(int word) { return word >> 1; }
__device__ inline bool whole_tile(int word) { return word & 1; }

__device__ inline bool shapes_scores(const AttentionParams& p) {
    return p.softcap > 0 || p.bias.data;
}
__device__ inline float score_unit(const AttentionParams& p) {
    return shapes_scores(p) ? 1 : p.softmax_scale;
}

// The first of this thread's columns.
__device__ inline int first_column(int col0) { return col0 + threadIdx.x % 4 * 2; }

template <class T>
struct alignas(2 * sizeof(T)) Pair {
    T x, y;
};

// Reads at[column] for this thread's columns, in pairs where they lie so, a few at a time as
// registers are scarce, and calls f(n, pair). Of at count elements exist; the others are missing.
template <int kN, class T, class F>
__device__ void for_pairs(const T* at, int count, T missing, F&& f) {
    constexpr int kBatch = kN < 16 ? 4 : 8;
    const bool fast = __all_sync(
        ~0u, reinterpret_cast<uintptr_t>(at) % sizeof(Pair<T>) == 0 && count >= kN * 8 - 6);
#pragma unroll
    for (int n0 = 0; n0 < kN; n0 += kBatch) {
        Pair<T> pairs[kBatch];
        if (fast) {
#pragma unroll
            for (int i = 0; i < kBatch; ++i)
                if (n0 + i < kN) pairs[i] = *reinterpret_cast<const Pair<T>*>(at + (n0 + i) * 8);
        } else {
#pragma unroll
            for (int i = 0; i < kBatch; ++i) {
                const int n = (n0 + i) * 8;
                pairs[i] = {n < count ? at[n] : missing, n + 1 < count ? at[n + 1] : missing};
            }
        }
#pragma unroll
        for (int i = 0; i < kBatch; ++i)
            if (n0 + i < kN) f(n0 + i, pairs[i]);
    }
}
// Keeps the compiler from bringing all of a loop's loads forward, for which there is no room.
__device__ inline void pin(float& x) { asm volatile("" : "+f"(x)::"memory"); }

template <bool kTransposed, class T, int kN>
__device__ void add_bias(float (&scores)[kN][4], const BiasView& view, const Sequence& s,
                         const int (&head)[2], const int (&row)[2], int col0) {
    const int column = first_column(col0);
    const T* const bias = static_cast<const T*>(view.data) + s.batch * view.batch_stride;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const T* const of_head = bias + head[half] * view.head_stride;
        if constexpr (kTransposed) {
            const int count = row[half] < s.seqlen_k ? s.seqlen_q - column : 0;
#pragma unroll
            for (int n = 0; n < kN; ++n)
#pragma unroll
                for (int e = 0; e < 2; ++e)
                    if (n * 8 + e < count)
                        scores[n][half * 2 + e] +=
                            to_float(of_head[(column + n * 8 + e) * view.query_stride + row[half]]);
        } else {
            const int count = row[half] < s.seqlen_q ? s.seqlen_k - column : 0;
            for_pairs<kN>(of_head + row[half] * view.query_stride + column, count, T(0),
                          [&](int n, Pair<T> pair) {
                              scores[n][half * 2] += to_float(pair.x);
                              scores[n][half * 2 + 1] += to_float(pair.y);
                              pin(scores[n][half * 2]);
                              pin(scores[n][half * 2 + 1]);
                          });
        }
    }
}

// Softcap of q k^T. on_cap(n, e, slope) for every score, slope d cap(s) / d s.
template <class Element, int kN, class OnCap>
__device__ void cap_scores(float (&scores)[kN][4], const AttentionParams& p, OnCap&& on_cap) {
    // tanh.approx is right to 11 bits: more than bf16 has, no more than fp16.
    constexpr bool kApprox = std::is_same_v<Element, __nv_bfloat16>;
    const float scale = p.softmax_scale / p.softcap * (kApprox ? 1 : 2 * kLog2e);
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) {  // tanh(x) = 1 - 2 / (1 + exp(2 x))
            const float x = scores[n][e] * scale;
            const float ratio = kApprox ? tanh_approx(x) : 1 - __fdividef(2, 1 + exp2_approx(x));
            scores[n][e] = p.softcap * ratio;
            on_cap(n, e, 1 - ratio * ratio);
        }
}

// head: of each row; Element: of q. on_cap: of cap_scores, where there is a softcap.
template <class Element, bool kTransposed, int kN, class OnCap>
__device__ void shape_scores(float (&scores)[kN][4], const AttentionParams& p, const Sequence& s,
                             const int (&head)[2], const int (&row)[2], int col0, OnCap&& on_cap) {
    if (!shapes_scores(p)) return;
    if (p.softcap > 0) {
        cap_scores<Element>(scores, p, on_cap);
    } else {
#pragma unroll
        for (int n = 0; n < kN; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) scores[n][e] *= p.softmax_scale;
    }
    if (!p.bias.data) return;
    if (p.bias.dtype == DType::kFloat32)
        add_bias<kTransposed, float>(scores, p.bias, s, head, row, col0);
    else
        add_bias<kTransposed, Element>(scores, p.bias, s, head, row, col0);
}

// Sets scores to -inf where not sees(half, column, id of the column).
template <bool kTransposed, int kN, class Sees>
__device__ void hide_unless(float (&scores)[kN][4], const TokenIds& ids, const AttentionParams& p,
                            const Sequence& s, int col0, Sees&& sees) {
    const int column = first_column(col0);
    const int count = (kTransposed ? s.seqlen_q : s.seqlen_k) - column;
    const int32_t* const at = MaskedScores::ids_of<!kTransposed>(ids, p, s) + column;
    for_pairs<kN>(at, count, -1, [&](int n, Pair<int32_t> pair) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            if (!sees(e / 2, column + n * 8 + e % 2, e % 2 ? pair.y : pair.x))
                scores[n][e] = negative_infinity();
            pin(scores[n][e]);
        }
    });
}

// The ids of two rows; -1 where there is none.
template <bool kTransposed>
__device__ int2 row_ids(const TokenIds& ids, const AttentionParams& p, const Sequence& s,
                        const int (&row)[2]) {
    const int32_t* const at = MaskedScores::ids_of<kTransposed>(ids, p, s);
    const int rows = kTransposed ? s.seqlen_k : s.seqlen_q;
    return {row[0] < rows ? at[row[0]] : -1, row[1] < rows ? at[row[1]] : -1};
}

// The keys that query i sees where there are spans.
__device__ inline Span span_of(const AttentionParams& p, const Sequence& s, int i) {
    if (i >= s.seqlen_q) return {0, 0};
    const int2 span =
        reinterpret_cast<const int2*>(p.spans)[MaskedScores::ids_begin<false>(p, s) + i];
    return {span.x, min(span.y, s.seqlen_k)};
}

template <int kN>
__device__ void hide_outside(float (&scores)[kN][4], const Span (&window)[2], int col0) {
    const int column = first_column(col0);
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const int offset = n * 8 + e % 2;
            if (offset < window[e / 2].begin - column || offset >= window[e / 2].end - column)
                scores[n][e] = negative_infinity();
        }
}

template <bool kTransposed, int kN>
__device__ void hide_scores(float (&scores)[kN][4], const AttentionParams& p, const Sequence& s,
                            const int (&row)[2], int col0) {
    if (kTransposed && p.spans) {
#pragma unroll
        for (int n = 0; n < kN; ++n)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const Span span = span_of(p, s, first_column(col0) + n * 8 + e);
#pragma unroll
                for (int half = 0; half < 2; ++half)
                    if (row[half] < span.begin || row[half] >= span.end)
                        scores[n][half * 2 + e] = negative_infinity();
            }
        return;
    }
    Span window[2];
#pragma unroll
    for (int half = 0; half < 2; ++half)
        window[half] = p.spans       ? span_of(p, s, row[half])
                       : kTransposed ? s.queries_of(row[half])
                                     : s.keys_of(row[half]);
    if (p.images.q) {
        const int2 image = row_ids<kTransposed>(p.images, p, s, row);
        hide_unless<kTransposed>(scores, p.images, p, s, col0, [&](int half, int col, int id) {
            const int own = half ? image.y : image.x;
            return (col >= window[half].begin && col < window[half].end) || (own >= 0 && own == id);
        });
    } else {
        hide_outside(scores, window, col0);
    }
    if (p.segments.q) {
        const int2 segment = row_ids<kTransposed>(p.segments, p, s, row);
        hide_unless<kTransposed>(scores, p.segments, p, s, col0, [&](int half, int, int id) {
            return id == (half ? segment.y : segment.x);
        });
    }
}

}  // namespace vlmkernels
