// Backward on Hopper, what comes before the products: tiles, their place in shared memory, and the
// producer that fills it.
#pragma once

#include <cuda_runtime.h>

#include "attention/attention_tiles.h"
#include "attention/heads_sm90.cuh"
#include "attention/mask_sm90.cuh"
#include "attention/schedule.cuh"
#include "common/pipeline.cuh"

namespace vlmkernels {

template <class Element_, int kTileDim, BwdSide side, class Scores>
struct AttentionBwdTile90 {
    using Element = Element_;
    static constexpr bool kMasked = std::is_same_v<Scores, MaskedScores>;
    static constexpr AttentionBwdChoice kChoice = bwd_choice(kTileDim, side, kMasked);
    static constexpr bool kKeys = side == BwdSide::kKeys, kOverlap = kChoice.overlap;
    static constexpr int kHeadDim = kTileDim, kConsumers = kChoice.consumers;
    static constexpr int kRows = 64 * kConsumers, kBlock = kChoice.rows, kStages = kChoice.stages;
    static constexpr int kHeld = kChoice.held;
    static constexpr bool kAllHeld = kHeld == 2 * kTileDim / 16;
    static constexpr int kConsumerThreads = 128 * kConsumers;
    static constexpr int kThreads = kConsumerThreads + 128;
    // The producer of MaskedScores looks at ids.
    static constexpr int kProducerRegisters = kMasked ? 72 : 40;
    static constexpr int kConsumerRegisters = kMasked ? 216 : 232;
    static_assert(registers_fit(kThreads, kProducerRegisters, kConsumerRegisters));
    using X = SharedTile<64, kHeadDim>;  // two for each consumer, side by side
    using Y = SharedTile<kBlock, kHeadDim>;
    static constexpr int kStatsBytes = kKeys ? kBlock * int(sizeof(float2)) : 0;
    static constexpr int kStreamStart = 2 * kConsumers * X::kBytes;
    static constexpr int kStatsStart = kStreamStart + kStages * 2 * Y::kBytes;
    static constexpr int kBlockStart = kStatsStart + kStages * kStatsBytes;
    static constexpr int kBarrierStart =
        kBlockStart + (kMasked ? kStages * int(2 * sizeof(int)) : 0);
    using ResidentBarriers = PipelineBarriers<1>;
    using StreamBarriers = PipelineBarriers<kStages>;
    static constexpr int kSharedBytes =
        kBarrierStart + ResidentBarriers::kBytes + StreamBarriers::kBytes;
    static_assert(kBlock % 16 == 0);  // k of the products that follow
    static_assert(X::kBytes % X::kAlignment == 0 && Y::kBytes % Y::kAlignment == 0);
    static_assert(kSharedBytes <= 227 * 1024);
};

// 64 kConsumers rows of one head, and the blocks of the other side that they meet: for each of some
// heads those that start at begin, begin + kBlock, ... before end; with a mask some of them.
template <class Tile>
struct BwdWork {
    int row0, head, batch;
    Sequence sequence;
    int first_head, last_head;  // of the other side
    int begin, end;             // end: of the sequence, where all see all

    __device__ BwdWork(const AttentionParams& p, int3 tile)
        : row0(tile.x * Tile::kRows), head(tile.y), batch(tile.z), sequence(p, tile.z) {
        const int group = p.num_heads / p.num_heads_k;
        first_head = Tile::kKeys ? head * group : head / group;
        last_head = first_head + (Tile::kKeys ? group : 1);
        const int seqlen = Tile::kKeys ? sequence.seqlen_k : sequence.seqlen_q;
        const int last = min(row0 + Tile::kRows, seqlen) - 1;
        if constexpr (Tile::kMasked) {
            begin = 0, end = Tile::kKeys ? sequence.seqlen_q : sequence.seqlen_k;
        } else {
            begin = Tile::kKeys ? sequence.first_query(row0) / Tile::kBlock * Tile::kBlock : 0;
            end = Tile::kKeys ? sequence.seqlen_q : sequence.visible_keys(last);
        }
        if (row0 >= seqlen || begin >= end) begin = end = last_head = 0;
    }
    __device__ bool empty() const { return begin >= end; }
    // The rows of the other side's block at y0 that exist.
    __device__ int num_rows(int y0) const {
        return (Tile::kKeys ? sequence.seqlen_q : sequence.seqlen_k) - y0;
    }
    // Whether some row must not see some of the block at y0.
    __device__ bool masked(int y0) const {
        return Tile::kKeys ? sequence.first_query(row0 + Tile::kRows - 1) > y0
                           : sequence.visible_keys(row0) < y0 + Tile::kBlock;
    }
};

struct AttentionBwdMaps {
    CUtensorMap x0, x1, y0, y1;
};

template <class Tile>
struct BwdShared {
    uint32_t address;

    __device__ uint32_t x(int consumer, int which) const {
        return address + (consumer * 2 + which) * Tile::X::kBytes;
    }
    __device__ uint32_t y(int stage, int which) const {
        return address + Tile::kStreamStart + (stage * 2 + which) * Tile::Y::kBytes;
    }
    __device__ uint32_t stats(int stage) const {
        return address + Tile::kStatsStart + stage * Tile::kStatsBytes;
    }
    // Of MaskedScores: the tile_word() of the block in a stage, and its head.
    __device__ uint32_t block(int stage) const {
        return address + Tile::kBlockStart + stage * 2 * sizeof(int);
    }
    __device__ typename Tile::ResidentBarriers x_barriers() const {
        return {address + Tile::kBarrierStart};
    }
    __device__ typename Tile::StreamBarriers y_barriers() const {
        return {address + Tile::kBarrierStart + Tile::ResidentBarriers::kBytes};
    }
    __device__ void init() const {
        x_barriers().init(1, 4 * Tile::kConsumers);
        y_barriers().init(Tile::kKeys ? 33 : 1, 4 * Tile::kConsumers);
        fence_mbarrier_init();
    }
};

// By TMA: the resident rows of a CTA, and a block of the other side. One thread.
template <class Tile>
struct BwdLoads {
    const AttentionBackwardParams& p;
    const AttentionBwdMaps& maps;
    const BwdShared<Tile>& shared;

    __device__ void rows(const BwdWork<Tile>& work,
                         const typename Tile::ResidentBarriers::State& at) const {
        const auto barriers = shared.x_barriers();
        const Sequence& sequence = work.sequence;
        const int batch = p.cu_seqlens_q ? 0 : work.batch;
        const int start = (Tile::kKeys ? sequence.start_k : sequence.start_q) + work.row0;
        barriers.wait_empty(at);
        barriers.expect(at, 2 * Tile::kConsumers * Tile::X::kBytes);
        for (int i = 0; i < Tile::kConsumers; ++i) {
            load_heads<typename Tile::X>(shared.x(i, 0), maps.x0, barriers.full(at), start + i * 64,
                                         work.head, batch);
            load_heads<typename Tile::X>(shared.x(i, 1), maps.x1, barriers.full(at), start + i * 64,
                                         work.head, batch);
        }
    }
    __device__ void block(const BwdWork<Tile>& work, int head, int y0,
                          const typename Tile::StreamBarriers::State& at) const {
        const auto barriers = shared.y_barriers();
        const int batch = p.cu_seqlens_q ? 0 : work.batch;
        const int start = (Tile::kKeys ? work.sequence.start_q : work.sequence.start_k) + y0;
        barriers.wait_empty(at);
        barriers.expect(at, 2 * Tile::Y::kBytes);
        load_heads<typename Tile::Y>(shared.y(at.stage, 0), maps.y0, barriers.full(at), start, head,
                                     batch);
        load_heads<typename Tile::Y>(shared.y(at.stage, 1), maps.y1, barriers.full(at), start, head,
                                     batch);
    }
};

// One thread: all tiles of PlainScores.
template <class Tile>
__device__ void produce_bwd(const AttentionBackwardParams& p, const BwdLoads<Tile>& load) {
    typename Tile::ResidentBarriers::State x_at;
    typename Tile::StreamBarriers::State y_at;
    for (BwdSchedule<Tile> schedule(p); schedule.valid(); schedule.advance()) {
        const BwdWork<Tile> work(p, schedule.tile());
        if (work.empty()) continue;
        load.rows(work, x_at);
        x_at.advance();
        for (int head = work.first_head; head < work.last_head; ++head)
            for (int y0 = work.begin; y0 < work.end; y0 += Tile::kBlock, y_at.advance())
                load.block(work, head, y0, y_at);
    }
}

// One warp: copies the row_stats at stats, of kRows queries, of which num_rows exist; zeros beyond.
template <int kRows>
__device__ void load_row_stats(uint32_t shared, const float2* stats, int num_rows) {
    for (int row = threadIdx.x % 32; row < kRows; row += 32) {
        const bool valid = row < num_rows;
        cp_async_8(shared + row * sizeof(float2), valid ? stats + row : stats, valid);
    }
}

// One warp: the stats of a block of queries.
template <class Tile>
__device__ void load_block_stats(const AttentionBackwardParams& p, const BwdShared<Tile>& shared,
                                 const BwdWork<Tile>& work, int head, int y0,
                                 const typename Tile::StreamBarriers::State& at) {
    load_row_stats<Tile::kBlock>(shared.stats(at.stage),
                                 row_stats(p) + work.sequence.lse_index(p, y0, head),
                                 work.num_rows(y0));
    mbarrier_arrive_cp_async(shared.y_barriers().full(at));
}

// One warp: all stats of PlainScores.
template <class Tile>
__device__ void produce_stats(const AttentionBackwardParams& p, const BwdShared<Tile>& shared) {
    typename Tile::StreamBarriers::State at;
    for (BwdSchedule<Tile> schedule(p); schedule.valid(); schedule.advance()) {
        const BwdWork<Tile> work(p, schedule.tile());
        for (int head = work.first_head; head < work.last_head; ++head)
            for (int y0 = work.begin; y0 < work.end; y0 += Tile::kBlock, at.advance()) {
                shared.y_barriers().wait_empty(at);
                load_block_stats(p, shared, work, head, y0, at);
            }
    }
}

// One warp: all tiles and stats of MaskedScores. A stage without a block ends those of a tile.
template <class Tile>
__device__ void produce_masked(const AttentionBackwardParams& p, const BwdLoads<Tile>& load) {
    typename Tile::ResidentBarriers::State x_at;
    typename Tile::StreamBarriers::State y_at;
    const BwdShared<Tile>& shared = load.shared;
    const auto barriers = shared.y_barriers();
    const bool leader = threadIdx.x % 32 == 0;
    for (BwdSchedule<Tile> schedule(p); schedule.valid(); schedule.advance()) {
        const BwdWork<Tile> work(p, schedule.tile());
        if (work.empty()) continue;
        if (leader) load.rows(work, x_at);
        x_at.advance();
        MaskedScores::Tiles<!Tile::kKeys, Tile::kBlock> tiles(p, work.sequence, work.row0,
                                                              Tile::kRows);
        for (int head = work.first_head; head < work.last_head; ++head)
#pragma unroll 1
            for (auto tile = tiles.first(); tile.index >= 0; tile = tiles.next(tile)) {
                const int y0 = tile.index * Tile::kBlock;
                barriers.wait_empty(y_at);
                if (leader) {
                    store_shared(shared.block(y_at.stage), tile_word(tile));
                    store_shared(shared.block(y_at.stage) + 4, head);
                    load.block(work, head, y0, y_at);
                }
                if constexpr (Tile::kKeys) load_block_stats(p, shared, work, head, y0, y_at);
                y_at.advance();
            }
        barriers.wait_empty(y_at);
        if (leader) {
            store_shared(shared.block(y_at.stage), tile_word({-1, false}));
            mbarrier_arrive(barriers.full(y_at));
        }
        if constexpr (Tile::kKeys) mbarrier_arrive(barriers.full(y_at));
        y_at.advance();
    }
}

}  // namespace vlmkernels
