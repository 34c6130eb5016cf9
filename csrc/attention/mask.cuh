// What happens to the scores of a tile between q k^T and softmax, and which tiles are skipped, for
// forward and backward. A kernel takes one of two policies:
//   PlainScores   full or causal attention (AttentionParams::plain)
//   MaskedScores  window, segments, images, spans, softcap, bias
// which have
//   KeyTiles<n>    first() and next(tile) walk, last tile first, over the tiles of n keys that
//                  some query of a block sees until index < 0; whole(tile): nothing is masked
//   QueryTiles<n>  the same over the queries that see some key of a block
//   prepare        scores become unit(p) times scores that softmax takes; -inf where masked
// Accumulators are those of m16n8 tiles, of mma.sync and of wgmma alike: element e of tile (m, n)
// lies in row 16 m + 8 (e / 2) + lane / 4 and column 8 n + 2 (lane % 4) + e % 2 of the warp's part.
// Rows are queries and columns keys; kTransposed: the reverse.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "attention/sequence.cuh"
#include "common/vector.cuh"

namespace vlmkernels {

// Calls f(element, m, half, row, col) for every score; a row is (m, half).
template <int kM, int kN, class F>
__device__ void for_scores(float (&scores)[kM][kN][4], int row0, int col0, int lane, F&& f) {
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int col = col0 + n * 8 + lane % 4 * 2 + e;
#pragma unroll
            for (int m = 0; m < kM; ++m)
#pragma unroll
                for (int half = 0; half < 2; ++half)
                    f(scores[m][n][half * 2 + e], m, half, row0 + m * 16 + half * 8 + lane / 4,
                      col);
        }
}

struct PlainScores {
    struct Tile {
        int index;
    };

    __device__ static float unit(const AttentionParams& p) { return p.softmax_scale; }

    template <int kTile>
    struct KeyTiles {
        const int keys_of_some, keys_of_all;  // those before are seen by some, or every, query

        __device__ KeyTiles(const AttentionParams&, const Sequence& s, int row0, int rows)
            : keys_of_some(s.keys_of(min(row0 + rows, s.seqlen_q) - 1).end),
              keys_of_all(s.keys_of(row0).end) {}
        __device__ Tile first() const { return {(keys_of_some + kTile - 1) / kTile - 1}; }
        __device__ Tile next(Tile tile) const { return {tile.index - 1}; }
        __device__ bool whole(Tile tile) const { return (tile.index + 1) * kTile <= keys_of_all; }
    };

    template <int kTile>
    struct QueryTiles {
        const int seqlen_q, last_tile, queries_of_all;  // from queries_of_all on all see all keys

        __device__ QueryTiles(const AttentionParams&, const Sequence& s, int key0, int keys)
            : seqlen_q(s.seqlen_q),
              last_tile(s.queries_of(key0).begin / kTile),
              queries_of_all(s.queries_of(key0 + keys - 1).begin) {}
        __device__ Tile first() const { return next({(seqlen_q + kTile - 1) / kTile}); }
        __device__ Tile next(Tile tile) const {
            return {tile.index > last_tile ? tile.index - 1 : -1};
        }
        __device__ bool whole(Tile tile) const { return tile.index * kTile >= queries_of_all; }
    };

    template <bool kTransposed, int kM, int kN>
    __device__ static void prepare(float (&scores)[kM][kN][4], const AttentionParams&,
                                   const Sequence& sequence, int, int row0, int col0, int lane,
                                   bool whole) {
        if (whole) return;
#pragma unroll
        for (int m = 0; m < kM; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int row = row0 + m * 16 + half * 8 + lane / 4;
                const int limit =
                    kTransposed ? sequence.queries_of(row).begin : sequence.keys_of(row).end;
                const int bound = limit - col0 - lane % 4 * 2;
#pragma unroll
                for (int n = 0; n < kN; ++n)
#pragma unroll
                    for (int e = 0; e < 2; ++e)
                        if (kTransposed ? n * 8 + e < bound : n * 8 + e >= bound)
                            scores[m][n][half * 2 + e] = negative_infinity();
            }
    }
    // For the backward: also turns dp such that ds = p (dp - delta(m, n, e)).
    template <bool kTransposed, int kM, int kN, class Delta>
    __device__ static void prepare(float (&scores)[kM][kN][4], float (&)[kM][kN][4], Delta&&,
                                   const AttentionParams& p, const Sequence& sequence, int head,
                                   int row0, int col0, int lane, bool whole) {
        prepare<kTransposed>(scores, p, sequence, head, row0, col0, lane, whole);
    }
};

// What is known of a block of tokens: their smallest and largest segment, and image if there is
// one; or in the same places begin and end of their spans.
struct IdRange {
    int segment_min, segment_max, image_min, image_max;

    __device__ int begin_min() const { return segment_min; }
    __device__ int begin_max() const { return segment_max; }
    __device__ int end_min() const { return image_min; }
    __device__ int end_max() const { return image_max; }
    __device__ void add(const IdRange& other) {
        segment_min = min(segment_min, other.segment_min);
        segment_max = max(segment_max, other.segment_max);
        image_min = min(image_min, other.image_min);
        image_max = max(image_max, other.image_max);
    }
    __device__ static IdRange empty() { return {INT32_MAX, INT32_MIN, INT32_MAX, INT32_MIN}; }
};

struct MaskedScores {
    struct Tile {
        int index;
        bool is_whole;
    };

    __device__ static float unit(const AttentionParams&) { return 1; }

    // Of q (kKeys: of k): where the sequence's ids begin.
    template <bool kKeys>
    __device__ static int64_t ids_begin(const AttentionParams& p, const Sequence& s) {
        if (p.cu_seqlens_q) return kKeys ? s.start_k : s.start_q;
        return int64_t(s.batch) * (kKeys ? p.seqlen_k : p.seqlen_q);
    }

    template <bool kKeys>
    __device__ static IdRange id_range(const AttentionParams& p, const Sequence& s, Span tokens) {
        const int64_t begin = ids_begin<kKeys>(p, s);
        const int4* blocks =
            reinterpret_cast<const int4*>(p.id_ranges) + (kKeys ? id_blocks(p.num_tokens_q) : 0);
        IdRange range = IdRange::empty();
#pragma unroll 1  // a few, and registers are scarce
        for (int64_t i = (begin + tokens.begin) / kIdBlock;
             i <= (begin + tokens.end - 1) / kIdBlock; ++i) {
            const int4 x = blocks[i];
            range.add({x.x, x.y, x.z, x.w});
        }
        return range;
    }

    // Does some query of a block see some key of another one; does every query see every key?
    struct Cover {
        bool some, whole;

        __device__ Cover(const AttentionParams& p, const Sequence& s, Span queries, Span keys) {
            const Span first = s.keys_of(queries.begin), last = s.keys_of(queries.end - 1);
            some = keys.begin < last.end && keys.end > first.begin;
            whole = keys.begin >= last.begin && keys.end <= first.end;
            if (!p.has_ids()) return;
            const IdRange q = id_range<false>(p, s, {queries.begin, min(queries.end, s.seqlen_q)});
            if (p.spans) {
                some = keys.begin < q.end_max() && keys.end > q.begin_min();
                whole = keys.begin >= q.begin_max() && keys.end <= min(q.end_min(), s.seqlen_k);
                return;
            }
            const IdRange k = id_range<true>(p, s, {keys.begin, min(keys.end, s.seqlen_k)});
            some |= q.image_min <= k.image_max && k.image_min <= q.image_max;
            some &= q.segment_min <= k.segment_max && k.segment_min <= q.segment_max;
            whole &= max(q.segment_max, k.segment_max) == min(q.segment_min, k.segment_min);
        }
    };

    // Tiles of keys for a block of queries (kKeys), or of queries for a block of keys. The lanes of
    // a warp look at 32 tiles at a time.
    template <bool kKeys, int kTile>
    struct Tiles {
        const AttentionParams& p;
        const Sequence& sequence;
        const Span block;
        int group;             // of 32 tiles: the present one
        uint32_t seen, clear;  // of its tiles: those still to walk over, those without a mask

        __device__ Tiles(const AttentionParams& p, const Sequence& s, int block0, int size)
            : p(p), sequence(s), block{block0, block0 + size} {}
        __device__ Tile first() {
            group = (window().end + 32 * kTile - 1) / (32 * kTile);
            seen = clear = 0;
            return next({});
        }
        // What the block sees, or is seen by, at most.
        __device__ Span window() const {
            const Sequence& s = sequence;
            if (p.images.q || p.spans) return {0, kKeys ? s.seqlen_k : s.seqlen_q};
            if (kKeys)
                return {s.keys_of(block.begin).begin,
                        s.keys_of(min(block.end, s.seqlen_q) - 1).end};
            return {s.queries_of(block.begin).begin,
                    s.queries_of(min(block.end, s.seqlen_k) - 1).end};
        }
        __device__ Tile next(Tile) {
            while (!seen) {
                if (--group < window().begin / (32 * kTile)) return {-1, false};
                const int tile0 = (group * 32 + thread_in_block() % 32) * kTile;
                bool some = tile0 < (kKeys ? sequence.seqlen_k : sequence.seqlen_q), all = some;
                if (some) {
                    const Span tile = {tile0, tile0 + kTile};
                    const Cover cover(p, sequence, kKeys ? block : tile, kKeys ? tile : block);
                    some = cover.some, all = cover.whole;
                }
                seen = __ballot_sync(~0u, some);
                clear = __ballot_sync(~0u, all);
            }
            const int bit = 31 - __clz(int(seen));
            seen ^= 1u << bit;
            return {group * 32 + bit, (clear >> bit & 1) != 0};
        }
        __device__ bool whole(Tile tile) const { return tile.is_whole; }
    };
    template <int kTile>
    using KeyTiles = Tiles<true, kTile>;
    template <int kTile>
    using QueryTiles = Tiles<false, kTile>;

    __device__ static float cap(float score, float softcap) {  // softcap tanh(score / softcap)
        return softcap - __fdividef(2 * softcap, 1 + exp2_approx(score * (2 * kLog2e / softcap)));
    }

    template <bool kTransposed, class T, int kM, int kN>
    __device__ static void add_bias(float (&scores)[kM][kN][4], const BiasView& view,
                                    const Sequence& s, int head, int row0, int col0, int lane) {
        const T* bias = static_cast<const T*>(view.data) + s.batch * view.batch_stride +
                        head * view.head_stride;
        for_scores(scores, row0, col0, lane, [&](float& score, int, int, int row, int col) {
            const int query = kTransposed ? col : row, key = kTransposed ? row : col;
            if (query < s.seqlen_q && key < s.seqlen_k)
                score += to_float(bias[query * view.query_stride + key]);
        });
    }

    // The ids of a sequence's keys, or queries; null if there are none.
    template <bool kKeys>
    __device__ static const int32_t* ids_of(const TokenIds& ids, const AttentionParams& p,
                                            const Sequence& s) {
        if (!ids.q) return nullptr;
        return (kKeys ? ids.k : ids.q) + ids_begin<kKeys>(p, s);
    }

    // Sets scores to -inf unless sees(window of the row, id of the row, id of the column, column).
    // Row by row, reading the ids of columns again: they are in L1, registers are scarce.
    template <bool kTransposed, int kM, int kN, class Sees>
    __device__ static void hide_unless(float (&scores)[kM][kN][4], const TokenIds& ids,
                                       const AttentionParams& p, const Sequence& s, int row0,
                                       int col0, int lane, Sees&& sees) {
        const int rows = kTransposed ? s.seqlen_k : s.seqlen_q;
        const int cols = kTransposed ? s.seqlen_q : s.seqlen_k;
        const int32_t* row_ids = ids_of<kTransposed>(ids, p, s);
        const int32_t* col_ids = ids_of<!kTransposed>(ids, p, s);
#pragma unroll
        for (int i = 0; i < kM * 2; ++i) {
            const int row = row0 + i * 8 + lane / 4;
            const Span window = kTransposed ? s.queries_of(row) : s.keys_of(row);
            const int row_id = row_ids && row < rows ? row_ids[row] : -1;
#pragma unroll
            for (int j = 0; j < kN * 2; ++j) {
                const int col = col0 + lane % 4 * 2 + j / 2 * 8 + j % 2;
                const int col_id = col_ids && col < cols ? col_ids[col] : -1;
                if (!sees(window, row_id, col_id, col))
                    scores[i / 2][j / 2][i % 2 * 2 + j % 2] = negative_infinity();
            }
        }
    }

    template <bool kTransposed, int kM, int kN>
    __device__ static void hide_outside_spans(float (&scores)[kM][kN][4], const AttentionParams& p,
                                              const Sequence& s, int row0, int col0, int lane) {
        const int2* spans = reinterpret_cast<const int2*>(p.spans) + ids_begin<false>(p, s);
        for_scores(scores, row0, col0, lane, [&](float& score, int, int, int row, int col) {
            const int query = kTransposed ? col : row, key = kTransposed ? row : col;
            const int2 span = query < s.seqlen_q ? spans[query] : make_int2(0, 0);
            if (key < span.x || key >= min(span.y, s.seqlen_k)) score = negative_infinity();
        });
    }

    template <bool kTransposed, int kM, int kN>
    __device__ static void hide(float (&scores)[kM][kN][4], const AttentionParams& p,
                                const Sequence& s, int row0, int col0, int lane) {
        if (p.spans) return hide_outside_spans<kTransposed>(scores, p, s, row0, col0, lane);
        hide_unless<kTransposed>(scores, p.images, p, s, row0, col0, lane,
                                 [](Span window, int row_image, int col_image, int col) {
                                     return (col >= window.begin && col < window.end) ||
                                            (row_image >= 0 && row_image == col_image);
                                 });
        if (p.segments.q)
            hide_unless<kTransposed>(scores, p.segments, p, s, row0, col0, lane,
                                     [](Span, int row_segment, int col_segment, int) {
                                         return row_segment == col_segment;
                                     });
    }

    template <bool kTransposed, int kM, int kN>
    __device__ static void prepare(float (&scores)[kM][kN][4], const AttentionParams& p,
                                   const Sequence& s, int head, int row0, int col0, int lane,
                                   bool whole) {
        for_scores(scores, 0, 0, lane, [&](float& x, auto...) {
            x *= p.softmax_scale;
            if (p.softcap > 0) x = cap(x, p.softcap);
        });
        finish<kTransposed>(scores, p, s, head, row0, col0, lane, whole);
    }
    template <bool kTransposed, int kM, int kN, class Delta>
    __device__ static void prepare(float (&scores)[kM][kN][4], float (&dp)[kM][kN][4],
                                   Delta&& delta, const AttentionParams& p, const Sequence& s,
                                   int head, int row0, int col0, int lane, bool whole) {
#pragma unroll
        for (int m = 0; m < kM; ++m)
#pragma unroll
            for (int n = 0; n < kN; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    float& x = scores[m][n][e];
                    x *= p.softmax_scale;
                    if (p.softcap > 0) {
                        x = cap(x, p.softcap);
                        const float ratio = x / p.softcap, d = delta(m, n, e);
                        dp[m][n][e] = (dp[m][n][e] - d) * (1 - ratio * ratio) + d;
                    }
                }
        finish<kTransposed>(scores, p, s, head, row0, col0, lane, whole);
    }

  private:
    template <bool kTransposed, int kM, int kN>
    __device__ static void finish(float (&scores)[kM][kN][4], const AttentionParams& p,
                                  const Sequence& s, int head, int row0, int col0, int lane,
                                  bool whole) {
        if (p.bias.data) {
            if (p.bias.dtype == DType::kFloat32)
                add_bias<kTransposed, float>(scores, p.bias, s, head, row0, col0, lane);
            else if (p.bias.dtype == DType::kFloat16)
                add_bias<kTransposed, __half>(scores, p.bias, s, head, row0, col0, lane);
            else
                add_bias<kTransposed, __nv_bfloat16>(scores, p.bias, s, head, row0, col0, lane);
        }
        if (!whole) hide<kTransposed>(scores, p, s, row0, col0, lane);
    }
};

}  // namespace vlmkernels
