// Backward, dv = p^T dout and dk = softmax_scale ds^T q: a CTA holds a block of keys and values of
// one key head, and walks over the queries that see them, of all query heads that share the head,
// two blocks of q and dout in flight. Products are transposed (keys are rows), so that p^T and ds^T
// go from accumulators to the next product without leaving registers; sums stay in registers: no
// atomics, the same bits every time.
// A warp owns 16 kMTiles keys and 1 / kColumnWarps of head_dim, as 2 x head_dim sums may not fit.
#pragma once

#include <cuda_runtime.h>

#include "attention/mask.cuh"
#include "attention/store.cuh"
#include "common/mma.cuh"

namespace vlmkernels {

template <class Element_, int kHeadDim_, class Scores_>
struct AttentionDkdvTile {
    using Element = Element_;
    using Scores = Scores_;
    static constexpr bool kMasked = std::is_same_v<Scores, MaskedScores>;
    static constexpr int kHeadDim = kHeadDim_;
    static constexpr int kMTiles = 1;
    static constexpr int kColumnWarps = kHeadDim <= (kMasked ? 96 : 128) ? 1 : 2;
    static constexpr int kWarps = 4 * kColumnWarps;
    static constexpr int kThreads = kWarps * 32;
    static constexpr int kColumns = kHeadDim / kColumnWarps;  // of a warp
    static constexpr int kBlockN = kWarps / kColumnWarps * kMTiles * 16;
    static constexpr int kBlockM = kMasked           ? (kHeadDim <= 128 ? 32 : 16)
                                   : kHeadDim <= 96  ? 64
                                   : kHeadDim == 112 ? 48
                                   : kHeadDim <= 192 ? 32
                                                     : 16;
    static constexpr int kKeyBytes = kBlockN * kHeadDim * 2;
    static constexpr int kQueryBytes = kBlockM * kHeadDim * 2;
    static constexpr int kStageBytes = 2 * kQueryBytes + kBlockM * sizeof(float2);
    static constexpr int kSharedBytes = 2 * kKeyBytes + 2 * kStageBytes;
    static_assert(kSharedBytes <= 99 * 1024, "sm_86 and sm_89 have no more");
};

// The tiles of queries that a block of keys walks over: those of one head after the other.
template <class Tile>
struct HeadTiles {
    using Tiles = typename Tile::Scores::template QueryTiles<Tile::kBlockM>;
    struct Step {
        int head;
        typename Tile::Scores::Tile tile;  // index < 0: the walk is over
        __device__ int row0() const { return tile.index * Tile::kBlockM; }
    };
    Tiles tiles;

    __device__ HeadTiles(const AttentionParams& p, const Sequence& sequence, int key0)
        : tiles(p, sequence, key0, Tile::kBlockN) {}
    __device__ Step first() { return {0, tiles.first()}; }
    __device__ Step next(Step step, int num_heads) {
        step.tile = tiles.next(step.tile);
        if (step.tile.index < 0 && ++step.head < num_heads) step.tile = tiles.first();
        return step;
    }
};

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads)
    attention_dkdv_kernel(const AttentionBackwardParams p) {
    using Element = typename Tile::Element;
    using Scores = typename Tile::Scores;
    constexpr int kBlockM = Tile::kBlockM, kBlockN = Tile::kBlockN, kHeadDim = Tile::kHeadDim;
    constexpr int kMTiles = Tile::kMTiles, kThreads = Tile::kThreads, kColumns = Tile::kColumns;
    extern __shared__ __align__(128) unsigned char shared[];
    const int num_blocks = (p.seqlen_k + kBlockN - 1) / kBlockN;
    const BlockOfHead work(num_blocks, p.num_heads_k);
    const Sequence sequence(p, work.batch);
    const int key0 = work.block * kBlockN, num_keys = sequence.seqlen_k - key0;
    if (num_keys <= 0) return;
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const int warp_key = warp / Tile::kColumnWarps * kMTiles * 16;
    const int warp_chunk = warp % Tile::kColumnWarps * (kColumns / 8);
    const int heads_per_key_head = p.num_heads / p.num_heads_k;
    HeadTiles<Tile> tiles(p, sequence, key0);
    auto step = tiles.first();  // if it is the end, so it is for every head

    const uint32_t k_tile = shared_address(shared), v_tile = k_tile + Tile::kKeyBytes;
    auto q_tile = [&](int stage) { return v_tile + Tile::kKeyBytes + stage * Tile::kStageBytes; };
    auto load_queries = [&](int stage, int head_of_group, int row0) {
        const int head = work.head * heads_per_key_head + head_of_group;
        const int num_rows = sequence.seqlen_q - row0;
        load_tile<kBlockM, kHeadDim, kThreads>(q_tile(stage),
                                               sequence.queries<Element>(p.q, row0, head),
                                               p.q.token_stride, num_rows, p.head_dim, thread);
        load_tile<kBlockM, kHeadDim, kThreads>(q_tile(stage) + Tile::kQueryBytes,
                                               sequence.queries<Element>(p.dout, row0, head),
                                               p.dout.token_stride, num_rows, p.head_dim, thread);
        // Rows from num_rows on: q, dout and stats 0, hence p = 1 but nothing is added.
        if (thread < kBlockM)
            cp_async_8(q_tile(stage) + 2 * Tile::kQueryBytes + thread * sizeof(float2),
                       row_stats(p) + sequence.lse_index(p, row0 + thread, head),
                       thread < num_rows);
    };
    load_tile<kBlockN, kHeadDim, kThreads>(k_tile, sequence.keys<Element>(p.k, key0, work.head),
                                           p.k.token_stride, num_keys, p.head_dim, thread);
    load_tile<kBlockN, kHeadDim, kThreads>(v_tile, sequence.keys<Element>(p.v, key0, work.head),
                                           p.v.token_stride, num_keys, p.head_dim, thread);
    if (step.tile.index >= 0) load_queries(0, step.head, step.row0());
    cp_async_commit();

    float dk[kMTiles][kColumns / 8][4] = {}, dv[kMTiles][kColumns / 8][4] = {};
    const float scale_log2 = Scores::unit(p) * kLog2e;
    for (int stage = 0; step.tile.index >= 0; stage ^= 1) {
        cp_async_wait<0>();
        __syncthreads();  // this stage has landed, and all warps have left the other one
        const auto next = tiles.next(step, heads_per_key_head);
        if (next.tile.index >= 0) load_queries(stage ^ 1, next.head, next.row0());
        cp_async_commit();

        const uint32_t dout_tile = q_tile(stage) + Tile::kQueryBytes;
        const float4* stats = reinterpret_cast<const float4*>(
            shared + (dout_tile - k_tile) + Tile::kQueryBytes);  // of two neighbouring queries
        float probs[kMTiles][kBlockM / 8][4], ds[kMTiles][kBlockM / 8][4];
        multiply_rows<Element, kMTiles, kBlockM / 8, kHeadDim>(probs, lane, k_tile, warp_key,
                                                               q_tile(stage), 0);
        multiply_rows<Element, kMTiles, kBlockM / 8, kHeadDim>(ds, lane, v_tile, warp_key,
                                                               dout_tile, 0);
        auto delta = [&](int, int n, int e) {
            return reinterpret_cast<const float2*>(stats)[n * 8 + lane % 4 * 2 + e % 2].y;
        };
        Scores::template prepare<true>(
            probs, ds, delta, p, sequence, work.head * heads_per_key_head + step.head,
            key0 + warp_key, step.row0(), thread_in_block() % 32, tiles.tiles.whole(step.tile));
#pragma unroll
        for (int n = 0; n < kBlockM / 8; ++n) {
            const float4 two = stats[n * 4 + lane % 4];
#pragma unroll
            for (int m = 0; m < kMTiles; ++m)
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    probs[m][n][e] =
                        exp2_approx(probs[m][n][e] * scale_log2 - (e % 2 ? two.z : two.x));
                    ds[m][n][e] = probs[m][n][e] * (ds[m][n][e] - (e % 2 ? two.w : two.y));
                }
        }
        multiply_accumulators<Element, kHeadDim>(dv, probs, lane, dout_tile, 0, warp_chunk);
        multiply_accumulators<Element, kHeadDim>(dk, ds, lane, q_tile(stage), 0, warp_chunk);
        step = next;
    }
    cp_async_wait<0>();
    __syncthreads();  // all warps have left k and v: dk and dv take their place
    float one[kMTiles][2], scale[kMTiles][2];
#pragma unroll
    for (int i = 0; i < kMTiles * 2; ++i)
        one[i / 2][i % 2] = 1, scale[i / 2][i % 2] = p.softmax_scale;
    auto store = [&](const HeadsView& view, const auto& sum, const auto& factor, int offset) {
        auto rows = [&]<class T>() { return sequence.keys<T>(view, key0, work.head); };
        store_rows<Element, kHeadDim>(p.float32_out, sum, factor, lane, shared + offset, warp_key,
                                      warp_chunk, rows, view.token_stride, num_keys, p.head_dim);
    };
    store(p.dk, dk, scale, 0);
    store(p.dv, dv, one, Tile::kKeyBytes);
}

}  // namespace vlmkernels
