// Backward, dq = softmax_scale ds k with ds = p (dout v^T - delta): the walk of the forward kernel,
// with p recomputed from lse. Each CTA owns its rows of dq: no atomics, the same bits every time.
#pragma once

#include <cuda_runtime.h>

#include "attention/mask.cuh"
#include "attention/store.cuh"
#include "common/mma.cuh"

namespace vlmkernels {

template <class Element_, int kHeadDim_, class Scores_>
struct AttentionDqTile {
    using Element = Element_;
    using Scores = Scores_;
    static constexpr int kHeadDim = kHeadDim_;
    static constexpr bool kMasked = std::is_same_v<Scores, MaskedScores>;
    static constexpr int kMTiles = kHeadDim <= (kMasked ? 96 : 128) ? 2 : 1;
    static constexpr int kWarps = 4;
    static constexpr int kThreads = kWarps * 32;
    static constexpr int kBlockM = kWarps * kMTiles * 16;
    static constexpr int kBlockN = kMasked          ? (kHeadDim == 64 || kHeadDim == 128 ? 32 : 16)
                                   : kHeadDim <= 64 ? 48
                                   : kHeadDim <= 112 || kHeadDim == 192 ? 32
                                                                        : 16;
    static constexpr int kQueryBytes = kBlockM * kHeadDim * 2;
    static constexpr int kKeyBytes = kBlockN * kHeadDim * 2;
    static constexpr int kSharedBytes = 2 * kQueryBytes + 2 * 2 * kKeyBytes;
    static_assert(kSharedBytes <= 99 * 1024, "sm_86 and sm_89 have no more");
};

template <class Tile>
__device__ void store_dq(const AttentionBackwardParams& p,
                         const float (&dq)[Tile::kMTiles][Tile::kHeadDim / 8][4],
                         unsigned char* shared) {
    const QueryBlock<Tile> queries(p);
    float factor[Tile::kMTiles][2];
#pragma unroll
    for (int i = 0; i < Tile::kMTiles * 2; ++i) factor[i / 2][i % 2] = p.softmax_scale;
    auto rows = [&]<class T>() {
        return queries.sequence.template queries<T>(p.dq, queries.row0, queries.head);
    };
    store_rows<typename Tile::Element, Tile::kHeadDim>(
        p.float32_out, dq, factor, queries.lane, shared, queries.warp_row, 0, rows,
        p.dq.token_stride, queries.num_rows(), p.head_dim);
}

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads)
    attention_dq_kernel(const AttentionBackwardParams p) {
    using Element = typename Tile::Element;
    using Scores = typename Tile::Scores;
    constexpr int kBlockM = Tile::kBlockM, kBlockN = Tile::kBlockN, kHeadDim = Tile::kHeadDim;
    constexpr int kMTiles = Tile::kMTiles, kThreads = Tile::kThreads;
    extern __shared__ __align__(128) unsigned char shared[];
    const QueryBlock<Tile> queries(p);
    const Sequence& sequence = queries.sequence;
    const int row0 = queries.row0, num_rows = queries.num_rows();
    const int thread = queries.thread, lane = queries.lane, warp_row = queries.warp_row;
    if (num_rows <= 0) return;
    const int head_k = queries.head / (p.num_heads / p.num_heads_k);
    const Element* k = sequence.keys<Element>(p.k, 0, head_k);
    const Element* v = sequence.keys<Element>(p.v, 0, head_k);

    const uint32_t q_tile = shared_address(shared), dout_tile = q_tile + Tile::kQueryBytes;
    auto k_tile = [&](int stage) {
        return dout_tile + Tile::kQueryBytes + stage * 2 * Tile::kKeyBytes;
    };
    auto load_keys = [&](int stage, int col0) {
        const int num_keys = sequence.seqlen_k - col0;
        load_tile<kBlockN, kHeadDim, kThreads>(k_tile(stage), k + col0 * p.k.token_stride,
                                               p.k.token_stride, num_keys, p.head_dim, thread);
        load_tile<kBlockN, kHeadDim, kThreads>(k_tile(stage) + Tile::kKeyBytes,
                                               v + col0 * p.v.token_stride, p.v.token_stride,
                                               num_keys, p.head_dim, thread);
    };
    typename Scores::template KeyTiles<kBlockN> tiles(p, sequence, row0, kBlockM);
    auto tile = tiles.first();

    load_tile<kBlockM, kHeadDim, kThreads>(q_tile,
                                           sequence.queries<Element>(p.q, row0, queries.head),
                                           p.q.token_stride, num_rows, p.head_dim, thread);
    load_tile<kBlockM, kHeadDim, kThreads>(dout_tile,
                                           sequence.queries<Element>(p.dout, row0, queries.head),
                                           p.dout.token_stride, num_rows, p.head_dim, thread);
    if (tile.index >= 0) load_keys(0, tile.index * kBlockN);
    cp_async_commit();

    float2 stats[kMTiles][2];  // of this lane's rows
    float dq[kMTiles][kHeadDim / 8][4] = {};
#pragma unroll
    for (int m = 0; m < kMTiles; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = warp_row + m * 16 + half * 8 + lane / 4;
            stats[m][half] = row < num_rows
                                 ? row_stats(p)[sequence.lse_index(p, row0 + row, queries.head)]
                                 : make_float2(0, 0);
        }

    const float scale_log2 = Scores::unit(p) * kLog2e;
    for (int stage = 0; tile.index >= 0; stage ^= 1) {
        cp_async_wait<0>();
        __syncthreads();  // this stage has landed, and all warps have left the other one
        const auto next = tiles.next(tile);
        if (next.index >= 0) load_keys(stage ^ 1, next.index * kBlockN);
        cp_async_commit();

        float scores[kMTiles][kBlockN / 8][4], dp[kMTiles][kBlockN / 8][4];
        multiply_rows<Element, kMTiles, kBlockN / 8, kHeadDim>(scores, lane, q_tile, warp_row,
                                                               k_tile(stage), 0);
        multiply_rows<Element, kMTiles, kBlockN / 8, kHeadDim>(dp, lane, dout_tile, warp_row,
                                                               k_tile(stage) + Tile::kKeyBytes, 0);
        auto delta = [&](int m, int, int e) { return stats[m][e / 2].y; };
        Scores::template prepare<false>(scores, dp, delta, p, sequence, queries.head,
                                        row0 + warp_row, tile.index * kBlockN,
                                        thread_in_block() % 32, tiles.whole(tile));
#pragma unroll
        for (int m = 0; m < kMTiles; ++m)
#pragma unroll
            for (int n = 0; n < kBlockN / 8; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const float2 row = stats[m][e / 2];
                    dp[m][n][e] =
                        exp2_approx(scores[m][n][e] * scale_log2 - row.x) * (dp[m][n][e] - row.y);
                }
        multiply_accumulators<Element, kHeadDim>(dq, dp, lane, k_tile(stage), 0);
        tile = next;
    }
    cp_async_wait<0>();  // if there was no key, the queries may still be on their way
    __syncthreads();
    store_dq<Tile>(p, dq, shared);
}

}  // namespace vlmkernels
