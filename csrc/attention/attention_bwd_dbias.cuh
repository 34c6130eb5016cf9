// Backward, dbias = ds = p (dout v^T - delta), summed over what bias is broadcast over: a CTA owns
// a tile of dbias, and walks over the batch and the heads that share it. q k^T and dout v^T are
// computed again: no atomics, the same bits every time, and no memory beside dbias.
#pragma once

#include <cuda_runtime.h>

#include "attention/mask.cuh"
#include "common/mma.cuh"

namespace vlmkernels {

template <class Element_, int kHeadDim_>
struct AttentionDbiasTile {
    using Element = Element_;
    using Scores = MaskedScores;
    static constexpr int kHeadDim = kHeadDim_;
    static constexpr int kWarps = 4;
    static constexpr int kThreads = kWarps * 32;
    static constexpr int kBlockM = kWarps * 16;
    static constexpr int kBlockN = kHeadDim <= 128 ? 64 : 32;
    static constexpr int kQueryBytes = kBlockM * kHeadDim * 2;
    static constexpr int kKeyBytes = kBlockN * kHeadDim * 2;
    static constexpr int kSharedBytes = 2 * kQueryBytes + 2 * kKeyBytes;
    static_assert(kSharedBytes <= 99 * 1024, "sm_86 and sm_89 have no more");
};

// The tile of dbias that a CTA owns, and the batch and heads that share it.
template <class Tile>
struct DbiasWork {
    int row0, key0, head, batch;
    Span heads, batches;

    __device__ DbiasWork(const AttentionBackwardParams& p, int index) {
        const BlockOfHead work(index, rows(p) * cols(p), p.dbias.num_heads);
        row0 = work.block / cols(p) * Tile::kBlockM, key0 = work.block % cols(p) * Tile::kBlockN;
        head = work.head, batch = work.batch;
        heads = p.dbias.num_heads == 1 ? Span{0, p.num_heads} : Span{head, head + 1};
        batches = p.dbias.batch == 1 ? Span{0, p.batch} : Span{batch, batch + 1};
    }
    static constexpr int rows(const AttentionBackwardParams& p) {
        return (p.dbias.seqlen_q + Tile::kBlockM - 1) / Tile::kBlockM;
    }
    static constexpr int cols(const AttentionBackwardParams& p) {
        return (p.dbias.seqlen_k + Tile::kBlockN - 1) / Tile::kBlockN;
    }
    static constexpr int64_t num_tiles(const AttentionBackwardParams& p) {
        return int64_t(rows(p)) * cols(p) * p.dbias.num_heads * p.dbias.batch;
    }
};

// Adds the ds of one head of one sequence; its q, dout, k and v have landed.
template <class Tile, int kN>
__device__ void add_ds(float (&sum)[1][kN][4], const AttentionBackwardParams& p,
                       const Sequence& sequence, int head, int row0, int key0, bool whole,
                       uint32_t q_tile) {
    using Element = typename Tile::Element;
    const int lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * 16;
    const uint32_t dout_tile = q_tile + Tile::kQueryBytes;
    const uint32_t k_tile = dout_tile + Tile::kQueryBytes;
    float probs[1][kN][4], dp[1][kN][4];
    multiply_rows<Element, 1, kN, Tile::kHeadDim>(probs, lane, q_tile, warp_row, k_tile, 0);
    multiply_rows<Element, 1, kN, Tile::kHeadDim>(dp, lane, dout_tile, warp_row,
                                                  k_tile + Tile::kKeyBytes, 0);
    MaskedScores::prepare<false>(probs, p, sequence, head, row0 + warp_row, key0, lane, whole);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = row0 + warp_row + half * 8 + lane / 4;
        const float2 stats = row < sequence.seqlen_q
                                 ? row_stats(p)[sequence.lse_index(p, row, head)]
                                 : make_float2(-negative_infinity(), 0);
#pragma unroll
        for (int n = 0; n < kN; ++n)
#pragma unroll
            for (int e = half * 2; e < half * 2 + 2; ++e)
                sum[0][n][e] +=
                    exp2_approx(probs[0][n][e] * kLog2e - stats.x) * (dp[0][n][e] - stats.y);
    }
}

template <class T, class Tile>
__device__ void store_dbias_as(float (&sum)[1][Tile::kBlockN / 8][4], const BiasView& view,
                               const DbiasWork<Tile>& work) {
    T* out =
        static_cast<T*>(view.data) + work.batch * view.batch_stride + work.head * view.head_stride;
    for_scores(sum, work.row0 + threadIdx.x / 32 * 16, work.key0, threadIdx.x % 32,
               [&](float value, int, int, int row, int col) {
                   if (row < view.seqlen_q && col < view.seqlen_k)
                       out[row * view.query_stride + col] = from_float<T>(value);
               });
}

template <class Tile>
__device__ void store_dbias(float (&sum)[1][Tile::kBlockN / 8][4], const BiasView& view,
                            const DbiasWork<Tile>& work) {
    if (view.dtype == DType::kFloat32)
        store_dbias_as<float>(sum, view, work);
    else
        store_dbias_as<typename Tile::Element>(sum, view, work);
}

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 2)
    attention_dbias_kernel(const AttentionBackwardParams p) {
    using Element = typename Tile::Element;
    constexpr int kBlockM = Tile::kBlockM, kBlockN = Tile::kBlockN, kHeadDim = Tile::kHeadDim;
    constexpr int kThreads = Tile::kThreads;
    extern __shared__ __align__(128) unsigned char shared[];
    const DbiasWork<Tile> work(p, blockIdx.x);
    const int row0 = work.row0, key0 = work.key0, thread = threadIdx.x;
    const uint32_t q_tile = shared_address(shared), k_tile = q_tile + 2 * Tile::kQueryBytes;
    float sum[1][kBlockN / 8][4] = {};
    for (int batch = work.batches.begin; batch < work.batches.end; ++batch) {
        const Sequence sequence(p, batch);
        const int num_rows = sequence.seqlen_q - row0, num_keys = sequence.seqlen_k - key0;
        if (num_rows <= 0 || num_keys <= 0) continue;
        const MaskedScores::Cover cover(p, sequence, {row0, row0 + kBlockM},
                                        {key0, key0 + kBlockN});
        for (int head = work.heads.begin; cover.some && head < work.heads.end; ++head) {
            const int head_k = head / (p.num_heads / p.num_heads_k);
            auto load = [&](uint32_t tile, const Element* from, int64_t stride, auto rows, int n) {
                load_tile<decltype(rows)::value, kHeadDim, kThreads>(tile, from, stride, n,
                                                                     p.head_dim, thread);
            };
            using Queries = std::integral_constant<int, kBlockM>;
            using Keys = std::integral_constant<int, kBlockN>;
            __syncthreads();  // all warps have left the tiles before
            load(q_tile, sequence.queries<Element>(p.q, row0, head), p.q.token_stride, Queries(),
                 num_rows);
            load(q_tile + Tile::kQueryBytes, sequence.queries<Element>(p.dout, row0, head),
                 p.dout.token_stride, Queries(), num_rows);
            load(k_tile, sequence.keys<Element>(p.k, key0, head_k), p.k.token_stride, Keys(),
                 num_keys);
            load(k_tile + Tile::kKeyBytes, sequence.keys<Element>(p.v, key0, head_k),
                 p.v.token_stride, Keys(), num_keys);
            cp_async_commit();
            cp_async_wait<0>();
            __syncthreads();
            add_ds<Tile>(sum, p, sequence, head, row0, key0, cover.whole, q_tile);
        }
    }
    store_dbias(sum, p.dbias, work);
}

}  // namespace vlmkernels
