// Backward on Hopper: two kernels of one shape, without atomics, so that the same input gives the
// same bits. A consumer warpgroup holds 64 rows x of one side, the other side's blocks y stream by:
//             x          y          s        dp           sums
//   kQueries  q, dout    k, v       q k^T    dout v^T     dq += ds k
//   kKeys     k, v       q, dout    k q^T    v dout^T     dk += ds q, dv += p dout
// with p = exp2(scale_log2 s - lse log2(e)) and ds = p (dp - delta), transposed on the side of
// keys. p and ds stay in registers between the products. With key heads that several query heads
// share, the queries of all of them stream past.
// PlainScores: both sides know the blocks that a tile meets. MaskedScores: the producer warp walks
// over those that some row sees, and tells the consumers which block a stage holds.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>

#include "attention/attention_bwd_load_sm90.cuh"
#include "attention/instances.h"
#include "attention/softmax_sm90.cuh"
#include "common/launch.cuh"
#include "common/wgmma.cuh"

namespace vlmkernels {

// A consumer warpgroup: what it sums up, and the products.
template <class Tile>
struct BwdConsumer {
    using Element = typename Tile::Element;
    using Scores = float[Tile::kBlock / 8][4];
    using Fragments = uint32_t[Tile::kBlock / 16][4];
    using Sums = float[Tile::kHeadDim / 8][4];
    static constexpr int kAllConsumers = 1, kSteps = Tile::kHeadDim / 16;
    const BwdShared<Tile> shared;
    const int index, lane;
    uint32_t held[Tile::kHeld > 0 ? Tile::kHeld : 1][4];  // of the first steps of k
    typename Tile::ResidentBarriers::State x_at;
    typename Tile::StreamBarriers::State y_at;

    __device__ explicit BwdConsumer(const BwdShared<Tile>& shared)
        : shared(shared), index(warp_uniform(threadIdx.x / 128)), lane(threadIdx.x % 32) {}

    // The first of this thread's two rows among those of the CTA; the other is 8 below.
    __device__ static int row() {
        const int thread = thread_in_block();
        return thread / 32 * 16 + thread % 32 / 4;
    }
    // Of the block whose products are added next: with kOverlap the one before.
    __device__ int sums_stage() const {
        if constexpr (!Tile::kOverlap) return y_at.stage;
        return (y_at.stage > 0 ? y_at.stage : Tile::kStages) - 1;
    }
    __device__ void load_stats(float2 (&stats)[2], const AttentionBackwardParams& p,
                               const BwdWork<Tile>& work) const {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = work.row0 + this->row() + half * 8;
            if (row < work.sequence.seqlen_q)
                stats[half] = row_stats(p)[work.sequence.lse_index(p, row, work.head)];
        }
    }
    // What of the resident rows stays in registers: wgmma reads shared memory for y alone then.
    __device__ void hold_rows() {
        const int row = threadIdx.x % 128 / 32 * 16 + lane % 16;
#pragma unroll
        for (int i = 0; i < Tile::kHeld; ++i)
            ldmatrix(held[i], shared.x(index, i / kSteps) +
                                  Tile::X::offset(row, i % kSteps * 2 + lane / 16));
    }
    // s and dp of the block to come; asynchronous.
    __device__ void multiply_rows(Scores& s, Scores& dp) const {
        wgmma_fence();
#pragma unroll
        for (int which = 0; which < 2; ++which) {
            const uint64_t x = Tile::X::k_major(shared.x(index, which));
            const uint64_t y = Tile::Y::k_major(shared.y(y_at.stage, which));
#pragma unroll
            for (int i = 0; i < kSteps; ++i)
                if (which * kSteps + i < Tile::kHeld)
                    wgmma<Element, Major::kK, Major::kK>(which ? dp : s, held[which * kSteps + i],
                                                         y + Tile::Y::k_step(i), i > 0);
                else
                    wgmma<Element, Major::kK, Major::kK>(which ? dp : s, x + Tile::X::k_step(i),
                                                         y + Tile::Y::k_step(i), i > 0);
        }
        wgmma_commit();
    }
    // What a block adds to the sums; asynchronous.
    __device__ void add_products(Sums& ds_sum, Sums& p_sum, const Fragments& ds,
                                 const Fragments& probs) const {
        const uint64_t y0 = Tile::Y::mn_major(shared.y(sums_stage(), 0));
        const uint64_t y1 = Tile::Y::mn_major(shared.y(sums_stage(), 1));
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < Tile::kBlock / 16; ++i) {
            if constexpr (Tile::kKeys)
                wgmma<Element, Major::kK, Major::kMN>(p_sum, probs[i], y1 + Tile::Y::mn_step(i));
            wgmma<Element, Major::kK, Major::kMN>(ds_sum, ds[i], y0 + Tile::Y::mn_step(i));
        }
        wgmma_commit();
    }
    __device__ float delta(int n, int e, const float2 (&stats)[2]) const {
        if constexpr (!Tile::kKeys) return stats[e / 2].y;
        const float4 columns = load_shared_float4(column_stats(n));
        return e % 2 ? columns.w : columns.y;
    }
    // Of this thread's columns 8 n and 8 n + 1 (kKeys).
    __device__ uint32_t column_stats(int n) const {
        return shared.stats(y_at.stage) + n * 64 + lane % 4 * 16;
    }
    // s to p and dp to ds. stats: of this thread's two rows (kQueries).
    __device__ void differentiate(Scores& s, Scores& dp, const float2 (&stats)[2],
                                  float scale_log2) const {
#pragma unroll
        for (int n = 0; n < Tile::kBlock / 8; ++n) {
            float4 columns;
            if constexpr (Tile::kKeys) columns = load_shared_float4(column_stats(n));
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const float lse = !Tile::kKeys ? stats[e / 2].x : e % 2 ? columns.z : columns.x;
                const float delta = !Tile::kKeys ? stats[e / 2].y : e % 2 ? columns.w : columns.y;
                s[n][e] = exp2_approx(s[n][e] * scale_log2 - lse);
                dp[n][e] = s[n][e] * (dp[n][e] - delta);
            }
        }
    }
    // Zeros in place of what follows num_rows rows of the block to come: it is of other sequences.
    __device__ void clear_rows(int num_rows) const {
        const uint32_t zeros[4] = {};
        constexpr int kChunks = Tile::kHeadDim / 8;
#pragma unroll 1  // seldom needed: no registers for it elsewhere
        for (int i = thread_in_block(); i < (Tile::kBlock - num_rows) * kChunks;
             i += Tile::kConsumerThreads) {
            const uint32_t at = Tile::Y::offset(num_rows + i / kChunks, i % kChunks);
            store_shared(shared.y(y_at.stage, 0) + at, zeros);
            store_shared(shared.y(y_at.stage, 1) + at, zeros);
        }
        fence_proxy_async();
        named_barrier_sync(kAllConsumers, Tile::kConsumerThreads);
    }
    __device__ void release_block() {  // wgmma_wait() before it made the warp converge
        if (lane == 0) shared.y_barriers().release({sums_stage(), 0});
    }
    // Here the warp has yet to converge before lane 0 gives away what all lanes have read.
    __device__ void release_end() {  // the stage that holds no block
        __syncwarp();
        if (lane == 0) shared.y_barriers().release(y_at);
        y_at.advance();
    }
    __device__ void release_rows() {
        if constexpr (Tile::kHeld > 0) fence_proxy_async();  // lanes read what TMA writes next
        __syncwarp();
        if (lane == 0) shared.x_barriers().release(x_at);
        x_at.advance();
    }
};

template <class Tile>
__device__ void mask_plain(typename BwdConsumer<Tile>::Scores& s, const BwdWork<Tile>& work,
                           int y0) {
    const int row = work.row0 + BwdConsumer<Tile>::row();
    if constexpr (Tile::kKeys)
        mask_columns(s, work.sequence, row, y0);
    else
        mask_rows(s, work.sequence, row, y0);
}

// Softcap, bias and mask. head: of the block.
template <class Tile>
__device__ void mask_any(const BwdConsumer<Tile>& consumer, typename BwdConsumer<Tile>::Scores& s,
                         typename BwdConsumer<Tile>::Scores& dp, const float2 (&stats)[2],
                         const AttentionParams& p, const BwdWork<Tile>& work, int head, int y0,
                         bool whole) {
    const int row = work.row0 + consumer.row();
    const int rows[2] = {row, row + 8}, query_head = Tile::kKeys ? head : work.head;
    const int heads[2] = {query_head, query_head};
    shape_scores<typename Tile::Element, Tile::kKeys>(
        s, p, work.sequence, heads, rows, y0, [&](int n, int e, float slope) {
            const float delta = consumer.delta(n, e, stats);
            dp[n][e] = (dp[n][e] - delta) * slope + delta;
        });
    if (!whole) hide_scores<Tile::kKeys>(s, p, work.sequence, rows, y0);
}

// Calls step(y0, head, whole) for each block of the other side, once it is there. head, whole: only
// of MaskedScores.
template <class Tile, class Step>
__device__ void for_blocks(BwdConsumer<Tile>& consumer, const BwdWork<Tile>& work, Step&& step) {
    if constexpr (Tile::kMasked) {
        for (;; consumer.y_at.advance()) {
            consumer.shared.y_barriers().wait_full(consumer.y_at);
            const uint32_t block = consumer.shared.block(consumer.y_at.stage);
            const int word = load_shared_int(block);
            if (word < 0) break;
            step(tile_index(word) * Tile::kBlock, load_shared_int(block + 4), whole_tile(word));
        }
    } else {
        for (int head = work.first_head; head < work.last_head; ++head)
            for (int y0 = work.begin; y0 < work.end; y0 += Tile::kBlock, consumer.y_at.advance()) {
                consumer.shared.y_barriers().wait_full(consumer.y_at);
                step(y0, head, false);
            }
    }
}

// The sums of one block of resident rows.
template <class Tile>
__device__ void sum_bwd(BwdConsumer<Tile>& consumer, const AttentionBackwardParams& p,
                        const BwdWork<Tile>& work, typename BwdConsumer<Tile>::Sums& ds_sum,
                        typename BwdConsumer<Tile>::Sums& p_sum) {
    using Element = typename Tile::Element;
    if (work.empty()) return;
    typename BwdConsumer<Tile>::Scores s, dp;
    typename BwdConsumer<Tile>::Fragments probs, ds;
    const float scale_log2 = (Tile::kMasked ? score_unit(p) : p.softmax_scale) * kLog2e;
    [[maybe_unused]] const bool shaped = shapes_scores(p);
    float2 stats[2] = {};
    if constexpr (!Tile::kKeys) consumer.load_stats(stats, p, work);
    bool pending = false;  // probs and ds are still to be multiplied
    auto step = [&](int y0, [[maybe_unused]] int head, [[maybe_unused]] bool whole) {
        if (p.cu_seqlens_k && work.num_rows(y0) < Tile::kBlock)
            consumer.clear_rows(work.num_rows(y0));
        consumer.multiply_rows(s, dp);
        if (pending) {
            consumer.add_products(ds_sum, p_sum, ds, probs);
            wgmma_wait<1>();
        } else {
            wgmma_wait<0>();
        }
        if constexpr (Tile::kMasked) {
            if (!whole || shaped) mask_any(consumer, s, dp, stats, p, work, head, y0, whole);
        } else if (work.masked(y0)) {
            mask_plain<Tile>(s, work, y0);
        }
        consumer.differentiate(s, dp, stats, scale_log2);
        if (pending) {
            wgmma_wait<0>();
            consumer.release_block();
        }
        if constexpr (Tile::kKeys) pack_probabilities<Element>(probs, s);
        pack_probabilities<Element>(ds, dp);
        pending = Tile::kOverlap;
        if constexpr (!Tile::kOverlap) {
            consumer.add_products(ds_sum, p_sum, ds, probs);
            wgmma_wait<0>();
            consumer.release_block();
        }
    };
    consumer.shared.x_barriers().wait_full(consumer.x_at);
    consumer.hold_rows();
    if (Tile::kAllHeld) consumer.release_rows();
    for_blocks(consumer, work, step);
    if (!Tile::kAllHeld) consumer.release_rows();
    if (Tile::kOverlap && (!Tile::kMasked || pending)) {
        consumer.add_products(ds_sum, p_sum, ds, probs);
        wgmma_wait<0>();
        consumer.release_block();
    }
    if constexpr (Tile::kMasked) consumer.release_end();
}

template <class T, class Tile>
__device__ void store_bwd(const BwdConsumer<Tile>& consumer, const AttentionBackwardParams& p,
                          const BwdWork<Tile>& work, const typename BwdConsumer<Tile>::Sums& ds_sum,
                          const typename BwdConsumer<Tile>::Sums& p_sum) {
    const int row = work.row0 + consumer.row();
    const Sequence& sequence = work.sequence;
    if constexpr (Tile::kKeys) {
        store_rows(ds_sum, sequence.keys<T>(p.dk, 0, work.head), p.dk.token_stride, row,
                   sequence.seqlen_k, p.head_dim, consumer.lane);
        store_rows(p_sum, sequence.keys<T>(p.dv, 0, work.head), p.dv.token_stride, row,
                   sequence.seqlen_k, p.head_dim, consumer.lane);
    } else {
        store_rows(ds_sum, sequence.queries<T>(p.dq, 0, work.head), p.dq.token_stride, row,
                   sequence.seqlen_q, p.head_dim, consumer.lane);
    }
}

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    attention_bwd_sm90_kernel(const __grid_constant__ AttentionBwdMaps maps,
                              const __grid_constant__ AttentionBackwardParams p) {
    if constexpr (kHopperCode) {
        extern __shared__ __align__(1024) unsigned char shared_bytes[];
        const BwdShared<Tile> shared{shared_address(shared_bytes)};
        if (threadIdx.x == 0) shared.init();
        __syncthreads();
        if (threadIdx.x >= Tile::kConsumerThreads) {
            decrease_registers<Tile::kProducerRegisters>();
            const int thread = threadIdx.x - Tile::kConsumerThreads;
            const BwdLoads<Tile> load{p, maps, shared};
            if constexpr (Tile::kMasked) {
                if (thread < 32) produce_masked(p, load);
            } else {
                if (thread == 0) produce_bwd(p, load);
                if (Tile::kKeys && thread / 32 == 1) produce_stats(p, shared);
            }
            return;
        }
        increase_registers<Tile::kConsumerRegisters>();
        BwdConsumer<Tile> consumer(shared);
        for (BwdSchedule<Tile> schedule(p); schedule.valid(); schedule.advance()) {
            const int3 tile = schedule.tile();
            float ds_sum[Tile::kHeadDim / 8][4] = {}, p_sum[Tile::kHeadDim / 8][4] = {};
            sum_bwd(consumer, p, BwdWork<Tile>(p, tile), ds_sum, p_sum);
            const float scale[2] = {p.softmax_scale, p.softmax_scale};
            scale_rows(ds_sum, scale);
            const BwdWork<Tile> work(p, tile);
            if (p.float32_out)
                store_bwd<float>(consumer, p, work, ds_sum, p_sum);
            else
                store_bwd<typename Tile::Element>(consumer, p, work, ds_sum, p_sum);
        }
    }
}

template <class Tile>
Error launch_bwd_sm90(AttentionBackwardParams p, Stream stream,
                      void (*kernel)(AttentionBwdMaps,
                                     AttentionBackwardParams) = attention_bwd_sm90_kernel<Tile>) {
    AttentionBwdMaps maps;
    CUtensorMap *q = &maps.x0, *dout = &maps.x1, *k = &maps.y0, *v = &maps.y1;
    if (Tile::kKeys) std::swap(q, k), std::swap(dout, v);
    constexpr int kRowsQ = Tile::kKeys ? Tile::kBlock : 64,
                  kRowsK = Tile::kKeys ? 64 : Tile::kBlock;
    using Q = SharedTile<kRowsQ, Tile::kHeadDim>;
    using K = SharedTile<kRowsK, Tile::kHeadDim>;
    Error error = queries_map<Q>(q, p.q, p);
    if (!error) error = queries_map<Q>(dout, p.dout, p);
    if (!error) error = keys_map<K>(k, p.k, p);
    if (!error) error = keys_map<K>(v, p.v, p);
    const int tiles = BwdSchedule<Tile>::num_tiles(p), ctas = std::min(tiles, num_sms());
    if (!error) error = order_tiles(p, Tile::kRows, Tile::kKeys, tiles == ctas, stream);
    if (error) return error;
    return launch(kernel, ctas, Tile::kThreads, Tile::kSharedBytes, stream, maps, p);
}

template <class Element, int kTileDim, class Scores>
Error attention_bwd_sm90(const AttentionBackwardParams& p, Stream stream) {
    using Keys = AttentionBwdTile90<Element, kTileDim, BwdSide::kKeys, Scores>;
    using Queries = AttentionBwdTile90<Element, kTileDim, BwdSide::kQueries, Scores>;
    const Error error = launch_bwd_sm90<Keys>(p, stream);
    return error ? error : launch_bwd_sm90<Queries>(p, stream);
}

}  // namespace vlmkernels
