// Forward on Hopper: a persistent CTA of one producer and some consumer warpgroups. The producer
// brings blocks of queries, keys and values by TMA; a consumer owns 64 queries, with their output
// in registers, and walks over the keys they see, last block first. While the product p v of a
// block runs on the tensor cores its softmax of the next one runs on the other units (two wgmma
// groups in flight), and with ping_pong consumers take turns, so that one's softmax meets another's
// products.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>

#include "attention/attention_tiles.h"
#include "attention/heads_sm90.cuh"
#include "attention/instances.h"
#include "attention/schedule.cuh"
#include "attention/softmax_sm90.cuh"
#include "common/launch.cuh"
#include "common/pipeline.cuh"
#include "common/wgmma.cuh"

namespace vlmkernels {

template <class Element_, int kTileDim, FwdCase kCase>
struct AttentionFwdTile90 {
    using Element = Element_;
    static constexpr AttentionFwdChoice kChoice = fwd_choice(kTileDim, kCase);
    static constexpr int kHeadDim = kTileDim, kConsumers = kChoice.consumers;
    static constexpr int kBlockM = 64 * kConsumers, kBlockN = kChoice.keys;
    static constexpr int kStages = kChoice.stages, kQueryStages = kChoice.q_stages;
    static constexpr bool kPingPong = kChoice.ping_pong, kLongestFirst = kCase == FwdCase::kCausal;
    static constexpr bool kShort = kCase == FwdCase::kShort;  // few blocks: one loop for all
    static constexpr bool kMasked = kCase == FwdCase::kMasked;
    // One consumer needs no setmaxnreg, and its producer is a single warp.
    static constexpr int kProducerThreads = kConsumers == 1 ? 32 : 128;
    static constexpr int kConsumerThreads = 128 * kConsumers;
    static constexpr int kThreads = kConsumerThreads + kProducerThreads;
    static constexpr int kProducerRegisters = kConsumers == 3 ? 32 : kMasked ? 56 : 24;
    static constexpr int kConsumerRegisters = kConsumers == 3 ? 160 : kMasked ? 224 : 240;
    static_assert(kConsumers == 1 ||
                  registers_fit(kThreads, kProducerRegisters, kConsumerRegisters));
    using Q = SharedTile<64, kHeadDim>;  // of one consumer
    using K = SharedTile<kBlockN, kHeadDim>;
    static constexpr int kKeyStart = kQueryStages * kConsumers * Q::kBytes;
    static constexpr int kValueStart = kKeyStart + kStages * K::kBytes;
    static constexpr int kBarrierStart = kValueStart + kStages * K::kBytes;
    using QueryBarriers = PipelineBarriers<kQueryStages>;
    using KeyBarriers = PipelineBarriers<kStages>;
    static constexpr int kWordStart =
        kBarrierStart + QueryBarriers::kBytes + 2 * KeyBarriers::kBytes;
    static constexpr int kWords = kMasked ? kQueryStages + kStages : 0;
    static constexpr int kSharedBytes = kWordStart + kWords * 4;
    static_assert(Q::kBytes % Q::kAlignment == 0 && K::kBytes % K::kAlignment == 0);
    static_assert(kChoice.ctas * (kSharedBytes + 1024) <= 228 * 1024);
};

struct AttentionFwdMaps {
    CUtensorMap q, k, v;  // [batch, num_heads, seqlen, head_dim]; packed: batch 1
};

// The shared memory of a CTA, and the rings over it.
template <class Tile>
struct FwdShared {
    uint32_t address;

    __device__ uint32_t q(int stage, int consumer) const {
        return address + (stage * Tile::kConsumers + consumer) * Tile::Q::kBytes;
    }
    __device__ uint32_t k(int stage) const {
        return address + Tile::kKeyStart + stage * Tile::K::kBytes;
    }
    __device__ uint32_t v(int stage) const {
        return address + Tile::kValueStart + stage * Tile::K::kBytes;
    }
    __device__ typename Tile::QueryBarriers q_barriers() const {
        return {address + Tile::kBarrierStart};
    }
    __device__ typename Tile::KeyBarriers k_barriers() const {
        return {address + Tile::kBarrierStart + Tile::QueryBarriers::kBytes};
    }
    __device__ typename Tile::KeyBarriers v_barriers() const {
        return {k_barriers().address + Tile::KeyBarriers::kBytes};
    }
    // kMasked: the tile_word() of the block of keys that follows these queries, or these keys.
    __device__ uint32_t word_after_queries(int stage) const {
        return address + Tile::kWordStart + stage * 4;
    }
    __device__ uint32_t word_after_keys(int stage) const {
        return word_after_queries(Tile::kQueryStages + stage);
    }
    __device__ void init() const {  // a consumer releases with one lane of each warp
        q_barriers().init(1, 4 * Tile::kConsumers);
        k_barriers().init(1, 4 * Tile::kConsumers);
        v_barriers().init(1, 4 * Tile::kConsumers);
        fence_mbarrier_init();
    }
};

// One thread.
template <class Tile>
__device__ void produce_fwd(const AttentionParams& p, const AttentionFwdMaps& maps,
                            const FwdShared<Tile>& shared) {
    typename Tile::QueryBarriers::State q_at;
    typename Tile::KeyBarriers::State k_at, v_at;
    const auto q_barriers = shared.q_barriers();
    const auto k_barriers = shared.k_barriers(), v_barriers = shared.v_barriers();
    for (FwdSchedule<Tile> schedule(p); schedule.valid(); schedule.advance()) {
        const FwdWork<Tile> work(p, schedule.tile());
        if (work.num_blocks <= 0) continue;
        const Sequence& sequence = work.sequence;
        const int batch = p.cu_seqlens_q ? 0 : work.batch;
        const int head_k = work.head / (p.num_heads / p.num_heads_k);
        auto load = [&](const auto& barriers, auto& at, uint32_t tile, const CUtensorMap& map,
                        int block) {
            barriers.wait_empty(at);
            barriers.expect(at, Tile::K::kBytes);
            load_heads<typename Tile::K>(tile, map, barriers.full(at),
                                         sequence.start_k + block * Tile::kBlockN, head_k, batch);
            at.advance();
        };
        q_barriers.wait_empty(q_at);
        q_barriers.expect(q_at, Tile::kConsumers * Tile::Q::kBytes);
        for (int i = 0; i < Tile::kConsumers; ++i)
            load_heads<typename Tile::Q>(shared.q(q_at.stage, i), maps.q, q_barriers.full(q_at),
                                         sequence.start_q + work.row0 + i * 64, work.head, batch);
        q_at.advance();
        int block = work.num_blocks - 1;
        load(k_barriers, k_at, shared.k(k_at.stage), maps.k, block);
        for (; block > 0; --block) {
            load(k_barriers, k_at, shared.k(k_at.stage), maps.k, block - 1);
            load(v_barriers, v_at, shared.v(v_at.stage), maps.v, block);
        }
        load(v_barriers, v_at, shared.v(v_at.stage), maps.v, 0);
    }
}

// A consumer warpgroup: its 64 rows, and where in the rings it is.
template <class Tile>
struct FwdConsumer {
    using Element = typename Tile::Element;
    static constexpr int kSteps = Tile::kBlockN / 16;
    using Scores = float[Tile::kBlockN / 8][4];
    using Probs = uint32_t[kSteps][4];
    using Out = float[Tile::kHeadDim / 8][4];
    const FwdShared<Tile> shared;
    const int index, thread, lane, warp;  // of the warpgroup in the CTA; in the warpgroup
    typename Tile::QueryBarriers::State q_at;
    typename Tile::KeyBarriers::State k_at, v_at;
    int next_word;  // kMasked: of the block of keys to come

    __device__ explicit FwdConsumer(const FwdShared<Tile>& shared)
        : shared(shared),
          index(warp_uniform(threadIdx.x / 128)),
          thread(threadIdx.x % 128),
          lane(threadIdx.x % 32),
          warp(warp_uniform(threadIdx.x / 32 % 4)) {}

    __device__ void wait_queries() {
        shared.q_barriers().wait_full(q_at);
        if constexpr (Tile::kMasked)
            next_word = warp_uniform(load_shared_int(shared.word_after_queries(q_at.stage)));
    }
    // scores = q k^T of the next block of keys; asynchronous.
    __device__ void multiply_keys(Scores& scores) {
        shared.k_barriers().wait_full(k_at);
        const uint64_t q = Tile::Q::k_major(shared.q(q_at.stage, index));
        const uint64_t k = Tile::K::k_major(shared.k(k_at.stage));
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < Tile::kHeadDim / 16; ++i)
            wgmma<Element, Major::kK, Major::kK>(scores, q + Tile::Q::k_step(i),
                                                 k + Tile::K::k_step(i), i > 0);
        wgmma_commit();
        if constexpr (Tile::kMasked)
            next_word = warp_uniform(load_shared_int(shared.word_after_keys(k_at.stage)));
    }
    // out += p v of the next block of values; asynchronous.
    __device__ void multiply_values(Out& out, const Probs& probs, bool accumulate) {
        shared.v_barriers().wait_full(v_at);
        const uint64_t v = Tile::K::mn_major(shared.v(v_at.stage));
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < kSteps; ++i)
            wgmma<Element, Major::kK, Major::kMN>(out, probs[i], v + Tile::K::mn_step(i),
                                                  accumulate || i > 0);
        wgmma_commit();
    }
    __device__ void release_keys() {
        if (lane == 0) shared.k_barriers().release(k_at);
        k_at.advance();
    }
    __device__ void release_values() {
        if (lane == 0) shared.v_barriers().release(v_at);
        v_at.advance();
    }
    __device__ void release_queries() {
        if (lane == 0) shared.q_barriers().release(q_at);
        q_at.advance();
    }
    // Zeros in place of what follows num_rows values of the block to come: of other sequences, or
    // never written. Their p is 0, but 0 NaN is NaN.
    __device__ void clear_values(int num_rows) {
        shared.v_barriers().wait_full(v_at);
        const uint32_t zeros[4] = {};
        constexpr int kChunks = Tile::kHeadDim / 8;
#pragma unroll 1  // seldom needed: no registers for it elsewhere
        for (int i = thread_in_block(); i < (Tile::kBlockN - num_rows) * kChunks;
             i += Tile::kConsumerThreads)
            store_shared(
                shared.v(v_at.stage) + Tile::K::offset(num_rows + i / kChunks, i % kChunks), zeros);
        fence_proxy_async();
        named_barrier_sync(kAllConsumers, Tile::kConsumerThreads);
    }
    // Turns: a ring of named barriers.
    static constexpr int kAllConsumers = 1, kFirstTurn = 2;
    __device__ void give_turn(int to) const {
        if constexpr (Tile::kPingPong) named_barrier_arrive(kFirstTurn + to, 256);
    }
    __device__ void wait_turn() const {
        if constexpr (Tile::kPingPong) named_barrier_sync(kFirstTurn + index, 256);
    }
    __device__ int next_index() const { return index + 1 < Tile::kConsumers ? index + 1 : 0; }
};

// The scores of a block to probabilities, the mask applied where kMasked.
template <bool kMasked, class Tile>
__device__ void softmax_block(RowSoftmax& softmax, float (&scores)[Tile::kBlockN / 8][4],
                              const FwdWork<Tile>& work, int row, int block, float scale_log2,
                              float (&correction)[2]) {
    if (kMasked && block >= work.num_unmasked)
        mask_rows(scores, work.sequence, row, block * Tile::kBlockN);
    softmax.update<kMasked>(scores, scale_log2, correction);
}

// out and the softmax of this consumer's rows of one block of queries.
template <class Tile>
__device__ void attend_fwd(FwdConsumer<Tile>& consumer, const AttentionParams& p,
                           const FwdWork<Tile>& work, float (&out)[Tile::kHeadDim / 8][4],
                           RowSoftmax& softmax) {
    constexpr int kBlockN = Tile::kBlockN;
    using Element = typename Tile::Element;
    if (work.num_blocks <= 0) return;
    float scores[kBlockN / 8][4], correction[2];
    uint32_t probs[kBlockN / 16][4];
    const float scale_log2 = p.softmax_scale * kLog2e;
    const int row = work.row0 + consumer.index * 64 + consumer.warp * 16 + consumer.lane / 4;
    int block = work.num_blocks - 1;
    consumer.wait_queries();
    consumer.multiply_keys(scores);
    const int last_keys = work.sequence.seqlen_k - block * kBlockN;
    if ((p.cu_seqlens_k || p.cache_seqlens) && last_keys < kBlockN)
        consumer.clear_values(last_keys);
    wgmma_wait<0>();
    consumer.release_keys();
    softmax_block<true>(softmax, scores, work, row, block, scale_log2, correction);
    pack_probabilities<Element>(probs, scores);
    bool accumulate = false;
    auto step = [&]<bool kMasked>() {
        consumer.wait_turn();
        consumer.multiply_keys(scores);
        consumer.multiply_values(out, probs, accumulate);
        consumer.give_turn(consumer.next_index());
        wgmma_wait<1>();
        consumer.release_keys();
        softmax_block<kMasked>(softmax, scores, work, row, block - 1, scale_log2, correction);
        wgmma_wait<0>();
        consumer.release_values();
        scale_rows(out, correction);
        pack_probabilities<Element>(probs, scores);
        accumulate = true;
    };
    const int end = Tile::kShort ? 0 : work.num_unmasked;
    for (; block > end; --block) step.template operator()<true>();
    if constexpr (!Tile::kShort)
        for (; block > 0; --block) step.template operator()<false>();
    consumer.release_queries();
    consumer.multiply_values(out, probs, accumulate);
    wgmma_wait<0>();
    consumer.release_values();
}

template <class Tile>
__device__ void store_fwd(const FwdConsumer<Tile>& consumer, const AttentionParams& p,
                          const FwdWork<Tile>& work, float (&out)[Tile::kHeadDim / 8][4],
                          RowSoftmax& softmax) {
    const int row = work.row0 + consumer.index * 64 + consumer.warp * 16 + consumer.lane / 4;
    softmax.finish();
    float factor[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        factor[half] = softmax.inverse_sum(half);
        if (consumer.lane % 4 == 0 && row + half * 8 < work.sequence.seqlen_q)
            p.lse[work.sequence.lse_index(p, row + half * 8, work.head)] =
                softmax.lse(half, p.softmax_scale);
    }
    scale_rows(out, factor);
    using Element = typename Tile::Element;
    store_rows(out, work.sequence.template queries<Element>(p.out, 0, work.head),
               p.out.token_stride, row, work.sequence.seqlen_q, p.head_dim, consumer.lane);
}

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kChoice.ctas)
    attention_fwd_sm90_kernel(const __grid_constant__ AttentionFwdMaps maps,
                              const __grid_constant__ AttentionParams p) {
    if constexpr (kHopperCode) {
        extern __shared__ __align__(1024) unsigned char shared_bytes[];
        const FwdShared<Tile> shared{shared_address(shared_bytes)};
        if (threadIdx.x == 0) shared.init();
        __syncthreads();
        if (threadIdx.x >= Tile::kConsumerThreads) {
            if constexpr (Tile::kConsumers > 1) decrease_registers<Tile::kProducerRegisters>();
            if (threadIdx.x == Tile::kConsumerThreads) produce_fwd(p, maps, shared);
            return;
        }
        if constexpr (Tile::kConsumers > 1) increase_registers<Tile::kConsumerRegisters>();
        FwdConsumer<Tile> consumer(shared);
        if (consumer.index == Tile::kConsumers - 1) consumer.give_turn(0);
        for (FwdSchedule<Tile> schedule(p); schedule.valid(); schedule.advance()) {
            const int3 tile = schedule.tile();
            float out[Tile::kHeadDim / 8][4] = {};
            RowSoftmax softmax;
            attend_fwd(consumer, p, FwdWork<Tile>(p, tile), out, softmax);
            store_fwd(consumer, p, FwdWork<Tile>(p, tile), out, softmax);
        }
    }
}

template <class Tile>
Error launch_fwd_sm90(AttentionParams p, Stream stream) {
    AttentionFwdMaps maps;
    Error error = queries_map<typename Tile::Q>(&maps.q, p.q, p);
    if (!error) error = keys_map<typename Tile::K>(&maps.k, p.k, p);
    if (!error) error = keys_map<typename Tile::K>(&maps.v, p.v, p);
    const int tiles = FwdSchedule<Tile>::num_tiles(p);
    const int ctas = std::min(tiles, num_sms() * Tile::kChoice.ctas);
    if (!error) error = order_tiles(p, Tile::kBlockM, false, Tile::kShort || tiles == ctas, stream);
    if (error) return error;
    return launch(attention_fwd_sm90_kernel<Tile>, ctas, Tile::kThreads, Tile::kSharedBytes, stream,
                  maps, p);
}

template <class Element, int kTileDim>
Error attention_fwd_sm90(const AttentionParams& p, Stream stream) {
    auto with = [&]<FwdCase kCase>() {
        return launch_fwd_sm90<AttentionFwdTile90<Element, kTileDim, kCase>>(p, stream);
    };
    if (p.seqlen_q <= 64) return with.template operator()<FwdCase::kShort>();
    return p.causal() ? with.template operator()<FwdCase::kCausal>()
                      : with.template operator()<FwdCase::kFull>();
}

}  // namespace vlmkernels
