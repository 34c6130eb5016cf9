// Forward: a CTA holds a block of queries of one head in shared memory and its output in registers,
// and walks over the keys it sees, last block first, two blocks of keys and values in flight.
// A warp owns 16 kMTiles whole rows, so softmax needs no exchange between warps.
#pragma once

#include <cuda_runtime.h>

#include "attention/instances.h"
#include "attention/mask.cuh"
#include "attention/store.cuh"
#include "common/launch.cuh"
#include "common/mma.cuh"
#include "common/softmax.cuh"

namespace vlmkernels {

template <class Element_, int kHeadDim_, class Scores_>
struct AttentionFwdTile {
    using Element = Element_;
    using Scores = Scores_;
    static constexpr bool kMasked = std::is_same_v<Scores, MaskedScores>;
    static constexpr int kHeadDim = kHeadDim_;
    static constexpr int kMTiles = kHeadDim <= (kMasked ? 96 : 128) ? 2 : 1;  // out is in registers
    static constexpr int kWarps = 4;
    static constexpr int kThreads = kWarps * 32;
    static constexpr int kBlockM = kWarps * kMTiles * 16;
    static constexpr int kBlockN = kMasked ? (kHeadDim == 128  ? 64
                                              : kHeadDim == 64 ? 48
                                              : kHeadDim == 96 ? 32
                                                               : 16)
                                           : (kHeadDim <= 96    ? 64
                                              : kHeadDim <= 128 ? 48
                                                                : 32);
    static constexpr int kStages = 2;
    static constexpr int kQueryBytes = kBlockM * kHeadDim * 2;
    static constexpr int kKeyBytes = kBlockN * kHeadDim * 2;
    static constexpr int kSharedBytes = kQueryBytes + kStages * 2 * kKeyBytes;
    static_assert(kSharedBytes <= 99 * 1024, "sm_86 and sm_89 have no more");
};

template <class Tile>
__device__ void store_fwd(const AttentionParams& p,
                          const float (&out)[Tile::kMTiles][Tile::kHeadDim / 8][4],
                          OnlineSoftmax<Tile::kMTiles>& softmax, unsigned char* shared) {
    const QueryBlock<Tile> queries(p);
    softmax.finish();
    float factor[Tile::kMTiles][2];
#pragma unroll
    for (int m = 0; m < Tile::kMTiles; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = queries.warp_row + m * 16 + half * 8 + queries.lane / 4;
            factor[m][half] = softmax.inverse_sum(m, half);
            if (queries.lane % 4 == 0 && row < queries.num_rows())
                p.lse[queries.sequence.lse_index(p, queries.row0 + row, queries.head)] =
                    softmax.lse(m, half, Tile::Scores::unit(p));
        }
    auto rows = [&]<class T>() {
        return queries.sequence.template queries<T>(p.out, queries.row0, queries.head);
    };
    store_rows<typename Tile::Element, Tile::kHeadDim>(
        p.float32_out, out, factor, queries.lane, shared, queries.warp_row, 0, rows,
        p.out.token_stride, queries.num_rows(), p.head_dim);
}

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 2) attention_fwd_kernel(const AttentionParams p) {
    using Element = typename Tile::Element;
    using Scores = typename Tile::Scores;
    constexpr int kBlockM = Tile::kBlockM, kBlockN = Tile::kBlockN, kHeadDim = Tile::kHeadDim;
    extern __shared__ __align__(128) unsigned char shared[];
    const QueryBlock<Tile> queries(p);
    const Sequence& sequence = queries.sequence;
    const int row0 = queries.row0, thread = queries.thread;
    auto lane = [&] { return Tile::kMasked ? thread_in_block() % 32 : queries.lane; };  // registers
    if (queries.num_rows() <= 0) return;
    const int head_k = queries.head / (p.num_heads / p.num_heads_k);
    const Element* k = sequence.keys<Element>(p.k, 0, head_k);
    const Element* v = sequence.keys<Element>(p.v, 0, head_k);

    const uint32_t q_tile = shared_address(shared);
    auto k_tile = [&](int stage) {
        return q_tile + Tile::kQueryBytes + stage * 2 * Tile::kKeyBytes;
    };
    auto load_keys = [&](int stage, int col0) {
        const int num_keys = sequence.seqlen_k - col0;
        const int thread = kHeadDim > 96 || Tile::kMasked ? thread_in_block() : queries.thread;
        load_tile<kBlockN, kHeadDim, Tile::kThreads>(k_tile(stage), k + col0 * p.k.token_stride,
                                                     p.k.token_stride, num_keys, p.head_dim,
                                                     thread);
        load_tile<kBlockN, kHeadDim, Tile::kThreads>(k_tile(stage) + Tile::kKeyBytes,
                                                     v + col0 * p.v.token_stride, p.v.token_stride,
                                                     num_keys, p.head_dim, thread);
    };
    typename Scores::template KeyTiles<kBlockN> tiles(p, sequence, row0, kBlockM);
    auto tile = tiles.first();

    load_tile<kBlockM, kHeadDim, Tile::kThreads>(
        q_tile, sequence.queries<Element>(p.q, row0, queries.head), p.q.token_stride,
        queries.num_rows(), p.head_dim, thread);
    if (tile.index >= 0) load_keys(0, tile.index * kBlockN);
    cp_async_commit();

    float out[Tile::kMTiles][kHeadDim / 8][4] = {};
    OnlineSoftmax<Tile::kMTiles> softmax;
    const float scale_log2 = Scores::unit(p) * kLog2e;
    for (int stage = 0; tile.index >= 0; stage ^= 1) {
        cp_async_wait<0>();
        __syncthreads();  // this stage has landed, and all warps have left the other one
        const auto next = tiles.next(tile);
        if (next.index >= 0) load_keys(stage ^ 1, next.index * kBlockN);
        cp_async_commit();

        float scores[Tile::kMTiles][kBlockN / 8][4];
        multiply_rows<Element, Tile::kMTiles, kBlockN / 8, kHeadDim>(
            scores, lane(), q_tile, queries.warp_row, k_tile(stage), 0);
        const bool whole =
            !(Tile::kMasked && kHeadDim == 256) && tiles.whole(tile);  // saves a register
        Scores::template prepare<false>(scores, p, sequence, queries.head, row0 + queries.warp_row,
                                        tile.index * kBlockN, thread_in_block() % 32, whole);
        softmax.update(scores, out, scale_log2);
        multiply_accumulators<Element, kHeadDim>(out, scores, lane(),
                                                 k_tile(stage) + Tile::kKeyBytes, 0);
        tile = next;
    }

    cp_async_wait<0>();  // if there was no key, the queries may still be on their way
    __syncthreads();
    store_fwd<Tile>(p, out, softmax, shared);
}

template <class Element, int kHeadDim, class Scores>
Error attention_fwd(const AttentionParams& p, Stream stream) {
    using Tile = AttentionFwdTile<Element, kHeadDim, Scores>;
    const int64_t blocks = QueryBlock<Tile>::num_blocks(p);
    return launch(attention_fwd_kernel<Tile>, blocks * p.num_heads * p.batch, Tile::kThreads,
                  Tile::kSharedBytes, stream, p);
}

}  // namespace vlmkernels
