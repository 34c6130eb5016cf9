// Decoding: few queries, many keys. The query heads that share a key head are rows of one 16-row
// tile, so that the cache is read once; warps, and CTAs (splits), take different keys, and what
// they find is combined: warps in shared memory, splits in attention_rows.cuh. A warp has its own
// ring of key blocks in shared memory and never waits for another one.
#pragma once

#include <cuda_runtime.h>

#include "attention/instances.h"
#include "attention/mask.cuh"
#include "common/launch.cuh"
#include "common/mma.cuh"
#include "common/softmax.cuh"

namespace vlmkernels {

template <class Element_, int kHeadDim_>
struct AttentionDecodeTile {
    using Element = Element_;
    static constexpr int kHeadDim = kHeadDim_;
    static constexpr int kWarps = kHeadDim <= 128 ? 4 : 2;
    static constexpr int kThreads = kWarps * 32;
    static constexpr int kRows = kDecodeRows;
    static constexpr int kKeys = 16;  // of a block
    static constexpr int kStages = 2;
    static constexpr int kQueryBytes = kRows * kHeadDim * 2;
    static constexpr int kKeyBytes = kKeys * kHeadDim * 2;
    static constexpr int kWarpBytes = kStages * 2 * kKeyBytes;
    // After the walk the same memory holds each warp's rows in fp32, and their max and sum.
    static constexpr int kPartialBytes = kRows * (kHeadDim + 2) * 4;
    static constexpr int kSharedBytes =
        kWarps * (kWarpBytes > kPartialBytes ? kWarpBytes : kPartialBytes) + kQueryBytes;
    static_assert(kSharedBytes <= 99 * 1024, "sm_86 and sm_89 have no more");
};

// Where a CTA's rows are: row r is query r / group of head r % group of those that share a key
// head.
struct DecodeRows {
    int row0, num_rows, head0, group, split;
    BlockOfHead work;

    __device__ explicit DecodeRows(const AttentionDecodeParams& p, int rows)
        : work((p.seqlen_q * (p.num_heads / p.num_heads_k) + rows - 1) / rows * p.num_splits,
               p.num_heads_k) {
        group = p.num_heads / p.num_heads_k;
        split = work.block % p.num_splits;
        row0 = work.block / p.num_splits * rows;
        num_rows = min(rows, p.seqlen_q * group - row0);
        head0 = work.head * group;
    }
    __device__ int query(int row) const { return (row0 + row) / group; }
    __device__ int head(int row) const { return head0 + (row0 + row) % group; }
};

template <class Tile>
__device__ void load_decode_queries(const AttentionDecodeParams& p, const Sequence& sequence,
                                    const DecodeRows& rows, uint32_t tile) {
    using Layout = TileLayout<Tile::kHeadDim>;
    for (int i = threadIdx.x; i < Tile::kRows * Layout::kChunks; i += Tile::kThreads) {
        const int row = i / Layout::kChunks, chunk = i % Layout::kChunks;
        const bool valid = row < rows.num_rows && chunk * 8 < p.head_dim;
        const auto* q = sequence.queries<typename Tile::Element>(p.q, rows.query(valid ? row : 0),
                                                                 rows.head(valid ? row : 0));
        cp_async(tile + Layout::offset(row, chunk), q + (valid ? chunk * 8 : 0), valid);
    }
}

// Hides keys outside of the windows, where rows are not consecutive queries.
template <int kN>
__device__ void mask_decode_scores(float (&scores)[1][kN][4], const Sequence& sequence,
                                   const DecodeRows& rows, int col0, int lane) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
        const Span window = sequence.keys_of(rows.query(e / 2 * 8 + lane / 4));
        const int first = col0 + lane % 4 * 2 + e % 2;
#pragma unroll
        for (int n = 0; n < kN; ++n)
            if (first + n * 8 >= window.end || first + n * 8 < window.begin)
                scores[0][n][e] = negative_infinity();
    }
}

// Softcap leaves scores that are scaled already.
__device__ inline float decode_unit(const AttentionParams& p) {
    return p.softcap > 0 ? 1 : p.softmax_scale;
}

// Keys from `token` on; those of one block are in one page.
template <class T>
__device__ const T* cache_rows(const AttentionParams& p, const HeadsView& view, int batch,
                               int token, int head) {
    int64_t row = batch;
    if (p.block_table) {
        row = p.block_table[batch * p.block_table_stride + token / int(p.page_size)];
        token %= int(p.page_size);
    }
    return static_cast<const T*>(view.data) + row * view.batch_stride + token * view.token_stride +
           head * view.head_stride;
}

// A warp's unnormalised rows, then max and sum of each.
template <class Tile>
__device__ void store_partial(const float (&out)[1][Tile::kHeadDim / 8][4],
                              const OnlineSoftmax<1>& softmax, int lane, float* partial) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = half * 8 + lane / 4;
#pragma unroll
        for (int d = 0; d < Tile::kHeadDim / 8; ++d)
            *reinterpret_cast<float2*>(partial + row * Tile::kHeadDim + d * 8 + lane % 4 * 2) =
                make_float2(out[0][d][half * 2], out[0][d][half * 2 + 1]);
        if (lane % 4 == 0)
            *reinterpret_cast<float2*>(partial + Tile::kRows * Tile::kHeadDim + row * 2) =
                make_float2(softmax.max[0][half], softmax.sum[0][half]);
    }
}

// Combines the warps' rows, each thread some pairs of columns, and writes them: as the output, or
// as the partial output of this split.
template <class Tile>
__device__ void combine_warps(const AttentionDecodeParams& p, const Sequence& sequence,
                              const DecodeRows& rows, const float* partial) {
    constexpr int kStride = Tile::kRows * (Tile::kHeadDim + 2), kDim = Tile::kHeadDim;
    using Element = typename Tile::Element;
    const float scale_log2 = decode_unit(p) * kLog2e;
    const int64_t num_rows = int64_t(p.batch) * p.seqlen_q * p.num_heads;  // of a split
    for (int i = threadIdx.x; i < rows.num_rows * kDim / 2; i += Tile::kThreads) {
        const int row = i / (kDim / 2), column = i % (kDim / 2) * 2;
        if (column >= p.head_dim) continue;
        const float* maxima = partial + Tile::kRows * kDim + row * 2;
        float max = negative_infinity(), sum = 0, x = 0, y = 0;
#pragma unroll
        for (int w = 0; w < Tile::kWarps; ++w) max = fmaxf(max, maxima[w * kStride]);
        const float offset = max == negative_infinity() ? 0 : max * scale_log2;
#pragma unroll
        for (int w = 0; w < Tile::kWarps; ++w) {
            const float weight = exp2_approx(maxima[w * kStride] * scale_log2 - offset);
            const float* out = partial + w * kStride + row * kDim + column;
            sum += maxima[w * kStride + 1] * weight;
            x += out[0] * weight;
            y += out[1] * weight;
        }
        const int query = rows.query(row), head = rows.head(row);
        const float inverse = sum > 0 ? 1 / sum : sum;
        const float lse = sum == 0 ? negative_infinity() : max * decode_unit(p) + logf(sum);
        const int64_t at = sequence.lse_index(p, query, head);
        if (p.num_splits == 1) {
            *reinterpret_cast<uint32_t*>(sequence.queries<Element>(p.out, query, head) + column) =
                pack<Element>(x * inverse, y * inverse);
            if (column == 0) p.lse[at] = lse;
        } else {
            const int64_t row_of_split =
                (int64_t(sequence.batch) * p.seqlen_q + query) * p.num_heads + head;
            float* out =
                p.partial_out + (rows.split * num_rows + row_of_split) * p.head_dim + column;
            *reinterpret_cast<float2*>(out) = make_float2(x * inverse, y * inverse);
            if (column == 0) p.partial_lse[rows.split * num_rows + at] = lse;
        }
    }
}

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 3)
    attention_decode_kernel(const AttentionDecodeParams p) {
    using Element = typename Tile::Element;
    constexpr int kKeys = Tile::kKeys, kHeadDim = Tile::kHeadDim, kStages = Tile::kStages;
    extern __shared__ __align__(128) unsigned char shared[];
    const DecodeRows rows(p, Tile::kRows);
    const Sequence sequence(p, rows.work.batch);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const uint32_t q_tile = shared_address(shared);
    auto k_tile = [&](int stage) {
        return q_tile + Tile::kQueryBytes + warp * Tile::kWarpBytes + stage * 2 * Tile::kKeyBytes;
    };
    // This split takes a run of the key blocks that some row sees; its warps take turns.
    const Span first = sequence.keys_of(rows.query(0));
    const Span last = sequence.keys_of(rows.query(rows.num_rows - 1));
    const int first_block = first.begin / kKeys;
    const int num_blocks = max(0, (last.end + kKeys - 1) / kKeys - first_block);
    const int per_split = (num_blocks + p.num_splits - 1) / p.num_splits;
    const int end = first_block + min((rows.split + 1) * per_split, num_blocks);
    auto load_keys = [&](int stage, int block) {
        if (block < end) {
            const int num_keys = sequence.seqlen_k - block * kKeys;
            const int token = block * kKeys, batch = sequence.batch, head = rows.work.head;
            const Element* k = cache_rows<Element>(p, p.k, batch, token, head);
            const Element* v = cache_rows<Element>(p, p.v, batch, token, head);
            load_tile<kKeys, kHeadDim, 32>(k_tile(stage), k, p.k.token_stride, num_keys, p.head_dim,
                                           lane);
            load_tile<kKeys, kHeadDim, 32>(k_tile(stage) + Tile::kKeyBytes, v, p.v.token_stride,
                                           num_keys, p.head_dim, lane);
        }
        cp_async_commit();
    };
    load_decode_queries<Tile>(p, sequence, rows, q_tile);
    cp_async_commit();
    const int begin = first_block + rows.split * per_split + warp;
    for (int i = 0; i < kStages; ++i) load_keys(i, begin + i * Tile::kWarps);
    cp_async_wait<kStages>();
    __syncthreads();  // the queries have landed

    float out[1][kHeadDim / 8][4] = {};
    OnlineSoftmax<1> softmax;
    int stage = 0;
    for (int block = begin; block < end; block += Tile::kWarps) {
        cp_async_wait<kStages - 1>();
        __syncwarp();
        float scores[1][kKeys / 8][4];
        multiply_rows<Element, 1, kKeys / 8, kHeadDim>(scores, lane, q_tile, 0, k_tile(stage), 0);
        if (p.softcap > 0)
            for_scores(scores, 0, 0, lane, [&](float& x, auto...) {
                x = MaskedScores::cap(x * p.softmax_scale, p.softcap);
            });
        if ((block + 1) * kKeys > first.end || block * kKeys < last.begin)
            mask_decode_scores(scores, sequence, rows, block * kKeys, lane);
        softmax.update(scores, out, decode_unit(p) * kLog2e);
        multiply_accumulators<Element, kHeadDim>(out, scores, lane, k_tile(stage) + Tile::kKeyBytes,
                                                 0);
        __syncwarp();
        load_keys(stage, block + kStages * Tile::kWarps);
        stage = stage + 1 == kStages ? 0 : stage + 1;
    }
    softmax.finish();
    cp_async_wait<0>();
    __syncthreads();  // all warps have left their keys
    float* partial = reinterpret_cast<float*>(shared);
    store_partial<Tile>(out, softmax, lane, partial + warp * Tile::kPartialBytes / 4);
    __syncthreads();
    combine_warps<Tile>(p, sequence, rows, partial);
}

template <class Element, int kHeadDim>
Error attention_decode(const AttentionDecodeParams& p, Stream stream) {
    using Tile = AttentionDecodeTile<Element, kHeadDim>;
    const int64_t rows = int64_t(p.seqlen_q) * (p.num_heads / p.num_heads_k);
    const int64_t blocks = (rows + Tile::kRows - 1) / Tile::kRows * p.num_splits;
    return launch(attention_decode_kernel<Tile>, blocks * p.num_heads_k * p.batch, Tile::kThreads,
                  Tile::kSharedBytes, stream, p);
}

}  // namespace vlmkernels
