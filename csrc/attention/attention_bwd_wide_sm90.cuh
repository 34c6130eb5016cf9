// Backward on Hopper for more than 128 columns. dq comes from the kernel of attention_bwd_sm90.cuh.
// dk and dv of 64 keys are more than the registers of one warpgroup, so two share the keys:
//   the first      s^T  = k q^T      p  = exp2(scale_log2 s - lse log2(e))    dv += p dout
//   the second     dp^T = v dout^T   ds = p (dp - delta)                      dk += ds q
// Neither computes anything twice; p (times the slope of a softcap) is all that goes across,
// through shared memory, from each thread of the first to the thread of the second with the same
// scores. Masks, bias and softcap are the first one's.
#pragma once

#include "attention/attention_bwd_sm90.cuh"

namespace vlmkernels {

template <class Element, int kTileDim>
struct AttentionBwdWideTile90
    : AttentionBwdTile90<Element, kTileDim, BwdSide::kKeys, MaskedScores> {
    using Base = AttentionBwdTile90<Element, kTileDim, BwdSide::kKeys, MaskedScores>;
    static_assert(Base::kConsumers == 1 && !Base::kOverlap);
    static constexpr int kConsumerThreads = 256, kThreads = kConsumerThreads + 128;
    static constexpr int kWeightStages = 1, kWeightBytes = Base::kRows * Base::kBlock * 4;
    static constexpr int kWeightStart = (Base::kSharedBytes + 15) / 16 * 16;
    static constexpr int kWeightBarrierStart = kWeightStart + kWeightStages * kWeightBytes;
    using WeightBarriers = PipelineBarriers<kWeightStages>;
    static constexpr int kSharedBytes = kWeightBarrierStart + WeightBarriers::kBytes;
    static_assert(kSharedBytes <= 227 * 1024);
};

// A warpgroup of the pair; index: which. Of BwdConsumer's names those that fit.
template <class Tile>
struct BwdWideConsumer : BwdConsumer<Tile> {
    using Base = BwdConsumer<Tile>;
    using Base::index, Base::lane, Base::shared, Base::y_at;
    using typename Base::Fragments;
    using typename Base::Scores;
    using typename Base::Sums;
    typename Tile::WeightBarriers::State weights_at;

    using Base::Base;
    __device__ static int row() { return Base::row() % Tile::kRows; }
    __device__ typename Tile::WeightBarriers weight_barriers() const {
        return {shared.address + Tile::kWeightBarrierStart};
    }
    __device__ void init() const {  // one thread
        shared.x_barriers().init(1, 8);
        shared.y_barriers().init(33, 8);
        weight_barriers().init(4, 4);
        fence_mbarrier_init();
    }
    // This thread's four of column block n, in both warpgroups.
    __device__ uint32_t weights(int n) const {
        return shared.address + Tile::kWeightStart + weights_at.stage * Tile::kWeightBytes +
               (n * 128 + thread_in_block() % 128) * 16;
    }
    // s or dp of the block to come; asynchronous.
    __device__ void multiply_rows(Scores& c) const {
        const uint64_t x = Tile::X::k_major(shared.x(0, index));
        const uint64_t y = Tile::Y::k_major(shared.y(y_at.stage, index));
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < Tile::kHeadDim / 16; ++i)
            wgmma<typename Tile::Element, Major::kK, Major::kK>(c, x + Tile::X::k_step(i),
                                                                y + Tile::Y::k_step(i), i > 0);
        wgmma_commit();
    }
    // What a block adds to dv or dk; asynchronous.
    __device__ void add_product(Sums& sum, const Fragments& a) const {
        const uint64_t y = Tile::Y::mn_major(shared.y(this->sums_stage(), 1 - index));
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < Tile::kBlock / 16; ++i)
            wgmma<typename Tile::Element, Major::kK, Major::kMN>(sum, a[i],
                                                                 y + Tile::Y::mn_step(i));
        wgmma_commit();
    }
    // Softcap, bias and mask. head: of the block.
    __device__ void mask(Scores& s, const AttentionParams& p, const BwdWork<Tile>& work, int head,
                         int y0, bool whole) const {
        const int row = work.row0 + this->row(), rows[2] = {row, row + 8}, heads[2] = {head, head};
        shape_scores<typename Tile::Element, true>(
            s, p, work.sequence, heads, rows, y0,
            [&](int n, int e, float slope) { store_shared(weights(n) + e * 4, slope); });
        if (!whole) hide_scores<true>(s, p, work.sequence, rows, y0);
    }
    // s to p, and p to the other warpgroup.
    __device__ void give_weights(Scores& s, float scale_log2, bool capped) {
#pragma unroll
        for (int n = 0; n < Tile::kBlock / 8; ++n) {
            const float4 columns = load_shared_float4(this->column_stats(n));
            const float4 slope = capped ? load_shared_float4(weights(n)) : float4{1, 1, 1, 1};
#pragma unroll
            for (int e = 0; e < 4; ++e)
                s[n][e] = exp2_approx(s[n][e] * scale_log2 - (e % 2 ? columns.z : columns.x));
            store_shared(weights(n), make_float4(s[n][0] * slope.x, s[n][1] * slope.y,
                                                 s[n][2] * slope.z, s[n][3] * slope.w));
        }
        __syncwarp();
        if (lane == 0) mbarrier_arrive(weight_barriers().full(weights_at));
        weights_at.advance();
    }
    // dp to ds.
    __device__ void take_weights(Scores& dp) {
        weight_barriers().wait_full(weights_at);
#pragma unroll
        for (int n = 0; n < Tile::kBlock / 8; ++n) {
            const float4 columns = load_shared_float4(this->column_stats(n));
            const float4 weight = load_shared_float4(weights(n));
            dp[n][0] = weight.x * (dp[n][0] - columns.y);
            dp[n][1] = weight.y * (dp[n][1] - columns.w);
            dp[n][2] = weight.z * (dp[n][2] - columns.y);
            dp[n][3] = weight.w * (dp[n][3] - columns.w);
        }
        __syncwarp();
        if (lane == 0) weight_barriers().release(weights_at);
        weights_at.advance();
    }
};

// dv or dk of 64 keys.
template <class Tile>
__device__ void sum_bwd_wide(BwdWideConsumer<Tile>& consumer, const AttentionBackwardParams& p,
                             const BwdWork<Tile>& work, typename BwdWideConsumer<Tile>::Sums& sum) {
    if (work.empty()) return;
    typename BwdWideConsumer<Tile>::Scores c;
    typename BwdWideConsumer<Tile>::Fragments a;
    const float scale_log2 = score_unit(p) * kLog2e;
    const bool shaped = shapes_scores(p);
    consumer.shared.x_barriers().wait_full(consumer.x_at);
    for_blocks(consumer, work, [&](int y0, int head, bool whole) {
        const int num_rows = work.num_rows(y0);
        if (p.cu_seqlens_k && num_rows < Tile::kBlock) consumer.clear_rows(num_rows);
        consumer.multiply_rows(c);
        wgmma_wait<0>();
        if (consumer.index == 0) {
            consumer.weight_barriers().wait_empty(consumer.weights_at);
            if (!whole || shaped) consumer.mask(c, p, work, head, y0, whole);
            consumer.give_weights(c, scale_log2, p.softcap > 0);
        } else {
            consumer.take_weights(c);
        }
        pack_probabilities<typename Tile::Element>(a, c);
        consumer.add_product(sum, a);
        wgmma_wait<0>();
        consumer.release_block();
    });
    consumer.release_rows();
    consumer.release_end();
}

template <class T, class Tile>
__device__ void store_bwd_wide(const BwdWideConsumer<Tile>& consumer,
                               const AttentionBackwardParams& p, const BwdWork<Tile>& work,
                               const typename BwdWideConsumer<Tile>::Sums& sum) {
    const HeadsView& view = consumer.index == 0 ? p.dv : p.dk;
    store_rows(sum, work.sequence.template keys<T>(view, 0, work.head), view.token_stride,
               work.row0 + consumer.row(), work.sequence.seqlen_k, p.head_dim, consumer.lane);
}

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    attention_bwd_wide_sm90_kernel(const __grid_constant__ AttentionBwdMaps maps,
                                   const __grid_constant__ AttentionBackwardParams p) {
    if constexpr (kHopperCode) {
        extern __shared__ __align__(1024) unsigned char shared_bytes[];
        const BwdShared<Tile> shared{shared_address(shared_bytes)};
        BwdWideConsumer<Tile> consumer(shared);
        if (threadIdx.x == 0) consumer.init();
        __syncthreads();
        if (threadIdx.x >= Tile::kConsumerThreads) {
            decrease_registers<Tile::kProducerRegisters>();
            if (threadIdx.x < Tile::kConsumerThreads + 32)
                produce_masked(p, BwdLoads<Tile>{p, maps, shared});
            return;
        }
        increase_registers<Tile::kConsumerRegisters>();
        for (BwdSchedule<Tile> schedule(p); schedule.valid(); schedule.advance()) {
            const int3 tile = schedule.tile();
            typename BwdWideConsumer<Tile>::Sums sum = {};
            sum_bwd_wide(consumer, p, BwdWork<Tile>(p, tile), sum);
            const float unit = consumer.index == 0 ? 1 : p.softmax_scale;
            scale_rows(sum, {unit, unit});
            const BwdWork<Tile> work(p, tile);
            if (p.float32_out)
                store_bwd_wide<float>(consumer, p, work, sum);
            else
                store_bwd_wide<typename Tile::Element>(consumer, p, work, sum);
        }
    }
}

template <class Element, int kTileDim>
Error attention_bwd_wide_sm90(const AttentionBackwardParams& p, Stream stream) {
    using Keys = AttentionBwdWideTile90<Element, kTileDim>;
    using Queries = AttentionBwdTile90<Element, kTileDim, BwdSide::kQueries, MaskedScores>;
    const Error error = launch_bwd_sm90<Keys>(p, stream, attention_bwd_wide_sm90_kernel<Keys>);
    return error ? error : launch_bwd_sm90<Queries>(p, stream);
}

}  // namespace vlmkernels
