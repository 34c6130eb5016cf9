// dbias on Hopper: a persistent CTA takes tiles of dbias one after the other. For each it walks
// over the batch and the heads that share the tile and sums ds = p (dout v^T - delta) in registers;
// no atomics, the same bits every time. The producer warp skips what no query of the tile sees, and
// brings two items for each (batch, head): q and k, then dout and v, so that p is computed while
// dout v^T is multiplied. bias of a tile is the same in all its steps: it waits in shared memory.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>

#include "attention/attention_bwd_dbias.cuh"
#include "attention/attention_bwd_load_sm90.cuh"
#include "attention/instances.h"
#include "common/launch.cuh"
#include "common/wgmma.cuh"

namespace vlmkernels {

template <class Element_, int kTileDim>
struct AttentionDbiasTile90 {
    using Element = Element_;
    static constexpr AttentionDbiasChoice kChoice = dbias_choice(kTileDim);
    static constexpr int kHeadDim = kTileDim, kStages = kChoice.stages;
    static constexpr int kBlockM = 64 * kChoice.consumers, kBlockN = kChoice.keys;
    static constexpr int kConsumerThreads = 2 * kBlockM, kThreads = kConsumerThreads + 128;
    static constexpr int kProducerRegisters = 72;  // it looks at ids
    static constexpr int kConsumerRegisters = 216;
    static_assert(registers_fit(kThreads, kProducerRegisters, kConsumerRegisters));
    using Queries = SharedTile<kBlockM, kHeadDim>;
    using Keys = SharedTile<kBlockN, kHeadDim>;
    static constexpr int kItemBytes = Queries::kBytes + Keys::kBytes;
    static_assert(Queries::kBytes % Keys::kAlignment == 0 && kItemBytes % Keys::kAlignment == 0);
    static constexpr int kBiasStart = kStages * kItemBytes;
    static constexpr int kStatsStart = kBiasStart + kBlockM * kBlockN * int(sizeof(float));
    static constexpr int kStepStart = kStatsStart + kStages * kBlockM * int(sizeof(float2));
    static constexpr int kBarrierStart = kStepStart + kStages * int(2 * sizeof(int));
    using Barriers = PipelineBarriers<kStages>;
    static constexpr int kSharedBytes = kBarrierStart + Barriers::kBytes;
    static_assert(kSharedBytes <= 227 * 1024);
};

template <class Tile>
struct DbiasShared {
    uint32_t address;

    __device__ uint32_t rows(int stage) const { return address + stage * Tile::kItemBytes; }
    __device__ uint32_t keys(int stage) const { return rows(stage) + Tile::Queries::kBytes; }
    // Of this thread's column blocks.
    __device__ uint32_t bias(int n) const {
        return address + Tile::kBiasStart +
               (n * Tile::kConsumerThreads + thread_in_block()) * sizeof(float4);
    }
    __device__ uint32_t stats(int stage) const {
        return address + Tile::kStatsStart + stage * Tile::kBlockM * sizeof(float2);
    }
    // 2 batch + (is nothing masked?), negative after the last of a tile; and head.
    __device__ uint32_t step(int stage) const {
        return address + Tile::kStepStart + stage * 2 * sizeof(int);
    }
    __device__ typename Tile::Barriers barriers() const { return {address + Tile::kBarrierStart}; }
};

// One warp. Every lane arrives, as every lane copies stats; and the leader for TMA.
template <class Tile>
struct DbiasProducer {
    const AttentionBackwardParams& p;
    const AttentionBwdMaps& maps;
    const DbiasShared<Tile> shared;
    typename Tile::Barriers::State at;

    __device__ bool leader() const { return threadIdx.x % 32 == 0; }
    __device__ void load(const CUtensorMap& rows, const CUtensorMap& keys,
                         const DbiasWork<Tile>& work, const Sequence& sequence, int head) const {
        const uint32_t full = shared.barriers().full(at);
        const int batch = p.cu_seqlens_q ? 0 : sequence.batch;
        shared.barriers().expect(at, Tile::kItemBytes);
        load_heads<typename Tile::Queries>(shared.rows(at.stage), rows, full,
                                           sequence.start_q + work.row0, head, batch);
        load_heads<typename Tile::Keys>(shared.keys(at.stage), keys, full,
                                        sequence.start_k + work.key0,
                                        head / (p.num_heads / p.num_heads_k), batch);
    }
    __device__ void step(const DbiasWork<Tile>& work, const Sequence& sequence, int head,
                         bool whole) {
        const auto barriers = shared.barriers();
        barriers.wait_empty(at);
        if (leader()) {
            store_shared(shared.step(at.stage), sequence.batch * 2 + whole);
            load(maps.x0, maps.y0, work, sequence, head);
        }
        load_row_stats<Tile::kBlockM>(shared.stats(at.stage),
                                      row_stats(p) + sequence.lse_index(p, work.row0, head),
                                      sequence.seqlen_q - work.row0);
        mbarrier_arrive_cp_async(barriers.full(at));
        at.advance();
        barriers.wait_empty(at);
        if (leader()) load(maps.x1, maps.y1, work, sequence, head);
        mbarrier_arrive(barriers.full(at));
        at.advance();
    }
    __device__ void end() {
        shared.barriers().wait_empty(at);
        if (leader()) {
            store_shared(shared.step(at.stage), -1);
            mbarrier_arrive(shared.barriers().full(at));
        }
        mbarrier_arrive(shared.barriers().full(at));
        at.advance();
    }
    __device__ void tile(const DbiasWork<Tile>& work) {
        for (int batch = work.batches.begin; batch < work.batches.end; ++batch) {
            const Sequence sequence(p, batch);
            const Span rows = {work.row0, work.row0 + Tile::kBlockM};
            const Span keys = {work.key0, work.key0 + Tile::kBlockN};
            if (rows.begin >= sequence.seqlen_q || keys.begin >= sequence.seqlen_k) continue;
            const MaskedScores::Cover cover(p, sequence, rows, keys);
            const bool whole =
                cover.whole && rows.end <= sequence.seqlen_q && keys.end <= sequence.seqlen_k;
            for (int head = work.heads.begin; cover.some && head < work.heads.end; ++head)
                step(work, sequence, head, whole);
        }
        end();
    }
};

// A consumer warpgroup: 64 rows of a tile of dbias.
template <class Tile>
struct DbiasConsumer {
    using Scores = float[Tile::kBlockN / 8][4];
    const AttentionBackwardParams& p;
    const DbiasShared<Tile> shared;
    typename Tile::Barriers::State at;

    // The first of this thread's two rows in the tile; the other is 8 below.
    __device__ static int row() {
        const int thread = thread_in_block();
        return thread / 32 * 16 + thread % 32 / 4;
    }
    // The rows of the next item times its keys; asynchronous.
    __device__ void multiply(Scores& c) const {
        shared.barriers().wait_full(at);
        const uint64_t a =
            Tile::Queries::k_major(shared.rows(at.stage), warp_uniform(threadIdx.x / 128) * 64);
        const uint64_t b = Tile::Keys::k_major(shared.keys(at.stage));
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < Tile::kHeadDim / 16; ++i)
            wgmma<typename Tile::Element, Major::kK, Major::kK>(c, a + Tile::Queries::k_step(i),
                                                                b + Tile::Keys::k_step(i), i > 0);
        wgmma_commit();
    }
    __device__ void release(const typename Tile::Barriers::State& item) const {
        __syncwarp();
        if (threadIdx.x % 32 == 0) shared.barriers().release(item);
    }
    // bias times log2(e) to this thread's place in shared memory.
    __device__ void load_bias(const DbiasWork<Tile>& work) const {
        Scores bias = {};
        Sequence all(p, work.batch);
        all.seqlen_q = p.bias.seqlen_q, all.seqlen_k = p.bias.seqlen_k;
        const int rows[2] = {work.row0 + row(), work.row0 + row() + 8};
        const int heads[2] = {work.head, work.head};
        if (p.bias.dtype == DType::kFloat32)
            add_bias<false, float>(bias, p.bias, all, heads, rows, work.key0);
        else
            add_bias<false, typename Tile::Element>(bias, p.bias, all, heads, rows, work.key0);
#pragma unroll
        for (int n = 0; n < Tile::kBlockN / 8; ++n)
            store_shared(shared.bias(n), make_float4(bias[n][0] * kLog2e, bias[n][1] * kLog2e,
                                                     bias[n][2] * kLog2e, bias[n][3] * kLog2e));
    }
    // -inf where masked, or of rows that do not exist.
    __device__ void hide(Scores& s, const DbiasWork<Tile>& work, int batch) const {
        const Sequence sequence(p, batch);
        const int rows[2] = {work.row0 + row(), work.row0 + row() + 8};
        hide_scores<false>(s, p, sequence, rows, work.key0);
#pragma unroll
        for (int n = 0; n < Tile::kBlockN / 8; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e)
                if (rows[e / 2] >= sequence.seqlen_q) s[n][e] = negative_infinity();
    }
    // s to p.
    __device__ void exponentiate(Scores& s, const DbiasWork<Tile>& work, int step,
                                 const float2 (&stats)[2]) const {
        if (p.softcap > 0) cap_scores<typename Tile::Element>(s, p, [](int, int, float) {});
        const float unit = (p.softcap > 0 ? 1 : p.softmax_scale) * kLog2e;
#pragma unroll
        for (int n = 0; n < Tile::kBlockN / 8; ++n) {
            const float4 bias = load_shared_float4(shared.bias(n));
            s[n][0] = s[n][0] * unit + bias.x;
            s[n][1] = s[n][1] * unit + bias.y;
            s[n][2] = s[n][2] * unit + bias.z;
            s[n][3] = s[n][3] * unit + bias.w;
        }
        if (step % 2 == 0) hide(s, work, step / 2);
#pragma unroll
        for (int n = 0; n < Tile::kBlockN / 8; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) s[n][e] = exp2_approx(s[n][e] - stats[e / 2].x);
    }
    __device__ void tile(const DbiasWork<Tile>& work, float (&sum)[1][Tile::kBlockN / 8][4]) {
        Scores s, dp;
        load_bias(work);
        while (true) {
            shared.barriers().wait_full(at);
            const int step = load_shared_int(shared.step(at.stage));
            if (step < 0) break;
            const auto first = at;
            multiply(s);
            at.advance();
            multiply(dp);
            const uint32_t stats_at = shared.stats(first.stage) + row() * sizeof(float2);
            const float2 stats[2] = {load_shared_float2(stats_at),
                                     load_shared_float2(stats_at + 8 * sizeof(float2))};
            wgmma_wait<1>();
            release(first);
            exponentiate(s, work, step, stats);
            wgmma_wait<0>();
            release(at);
            at.advance();
#pragma unroll
            for (int n = 0; n < Tile::kBlockN / 8; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    // Of keys or rows that do not exist dp may be anything.
                    const float delta = stats[e / 2].y;
                    if (step % 2 == 0 && s[n][e] == 0) dp[n][e] = delta;
                    sum[0][n][e] += s[n][e] * (dp[n][e] - delta);
                }
        }
        release(at);
        at.advance();
    }
};

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    attention_dbias_sm90_kernel(const __grid_constant__ AttentionBwdMaps maps,
                                const __grid_constant__ AttentionBackwardParams p) {
    if constexpr (kHopperCode) {
        extern __shared__ __align__(1024) unsigned char shared_bytes[];
        const DbiasShared<Tile> shared{shared_address(shared_bytes)};
        const int tiles = DbiasWork<Tile>::num_tiles(p);
        if (threadIdx.x == 0) {
            shared.barriers().init(33, Tile::kConsumerThreads / 32);
            fence_mbarrier_init();
        }
        __syncthreads();
        if (threadIdx.x >= Tile::kConsumerThreads) {
            decrease_registers<Tile::kProducerRegisters>();
            if (threadIdx.x >= Tile::kConsumerThreads + 32) return;
            DbiasProducer<Tile> producer{p, maps, shared};
            for (int i = blockIdx.x; i < tiles; i += gridDim.x)
                producer.tile(DbiasWork<Tile>(p, i));
            return;
        }
        increase_registers<Tile::kConsumerRegisters>();
        DbiasConsumer<Tile> consumer{p, shared};
        for (int i = blockIdx.x; i < tiles; i += gridDim.x) {
            float sum[1][Tile::kBlockN / 8][4] = {};
            consumer.tile(DbiasWork<Tile>(p, i), sum);
            store_dbias<Tile>(sum, p.dbias, DbiasWork<Tile>(p, i));
        }
    }
}

template <class Element, int kTileDim>
Error attention_dbias_sm90(const AttentionBackwardParams& p, Stream stream) {
    using Tile = AttentionDbiasTile90<Element, kTileDim>;
    AttentionBwdMaps maps;
    Error error = queries_map<typename Tile::Queries>(&maps.x0, p.q, p);
    if (!error) error = queries_map<typename Tile::Queries>(&maps.x1, p.dout, p);
    if (!error) error = keys_map<typename Tile::Keys>(&maps.y0, p.k, p);
    if (!error) error = keys_map<typename Tile::Keys>(&maps.y1, p.v, p);
    if (error) return error;
    const int64_t ctas = std::min<int64_t>(DbiasWork<Tile>::num_tiles(p), num_sms());
    return launch(attention_dbias_sm90_kernel<Tile>, ctas, Tile::kThreads, Tile::kSharedBytes,
                  stream, maps, p);
}

}  // namespace vlmkernels
