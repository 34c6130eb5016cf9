// For sm_90a: as vq_lookup.cuh, with wgmma. One thread streams the codebook (bulk copies: the
// workspace has the order of shared memory); kGroups warpgroups hold 64 kM tokens each, and while
// one compares its scores the other multiplies.
#pragma once

#include "common/launch.cuh"
#include "common/pipeline.cuh"
#include "common/shared_tile.cuh"
#include "common/wgmma.cuh"
#include "vq_lookup/tokens.cuh"

namespace vlmkernels {

template <int kM_, int kGroups_, int kMostDim_>
struct VqHopperBlock {
    static constexpr int kM = kM_, kGroups = kGroups_, kMostDim = kMostDim_, kStages = 4;
    static constexpr int kThreads = 128 * (kGroups + 1), kTokens = 64 * kM * kGroups;
    static constexpr int kChunk = VqPrepared::kChunk, kTileCodes = VqPrepared::kTileCodes;
    static constexpr int kTokenChunkBytes = kTokens * kChunk * 2, kNormBytes = kTileCodes * 4;
    static constexpr int kChunkBytes = VqPrepared::kChunkBytes;
    // setmaxnreg, from 168 each (two groups) or 96 (four); one has enough without.
    static constexpr int kProducerRegisters = kGroups == 4 ? 24 : 40;
    static constexpr int kConsumerRegisters = kGroups == 4 ? 112 : 232;
    static_assert(kGroups == 1 || registers_fit(kThreads, kProducerRegisters, kConsumerRegisters));
    using Candidates = VqCandidates<kM, 12>;
    using Tokens = SharedTile<kTokens, kChunk>;
    using Codes = SharedTile<kTileCodes, kChunk>;
    // Shared memory: tokens, stages, their half norms, lists, barriers.
    static constexpr int kLists = kStages * (kChunkBytes + kNormBytes);
    static constexpr int kBarriers =
        kLists + kGroups * 4 * int(sizeof(typename Candidates::Shared));
    static int shared_bytes(int chunks) {
        return chunks * kTokenChunkBytes + kBarriers + PipelineBarriers<kStages>::kBytes;
    }
    static_assert(kMostDim / kChunk * kTokenChunkBytes + kBarriers + 128 <= 227 * 1024);
};

template <class Block>
__device__ void vq_produce(const VqPrepared& prepared, uint32_t stages,
                           PipelineBarriers<Block::kStages> barriers) {
    PipelineState<Block::kStages> at;
    const auto* from = reinterpret_cast<const unsigned char*>(prepared.codes);
    for (int tile = 0; tile < prepared.num_tiles; ++tile)
        for (int chunk = 0; chunk < prepared.num_chunks; ++chunk, at.advance()) {
            const bool last = chunk == prepared.num_chunks - 1;
            barriers.wait_empty(at);
            barriers.expect(at, Block::kChunkBytes + (last ? Block::kNormBytes : 0));
            bulk_load(stages + at.stage * Block::kChunkBytes, from, Block::kChunkBytes,
                      barriers.full(at));
            from += Block::kChunkBytes;
            if (last)
                bulk_load(
                    stages + Block::kStages * Block::kChunkBytes + at.stage * Block::kNormBytes,
                    prepared.half_norms + tile * Block::kTileCodes, Block::kNormBytes,
                    barriers.full(at));
        }
}

// scores = tokens codes^T for one tile. Releases all of its stages but the last one.
template <class Block, class State>
__device__ void vq_multiply_tile(float (&scores)[Block::kM][Block::kTileCodes / 8][4],
                                 uint32_t tokens, uint32_t stages, int row0, int num_chunks,
                                 PipelineBarriers<Block::kStages> barriers, State& at,
                                 State& before, int lane) {
    using Tokens = typename Block::Tokens;
    using Codes = typename Block::Codes;
    for (int chunk = 0; chunk < num_chunks; ++chunk, at.advance()) {
        barriers.wait_full(at);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < Block::kChunk / 16; ++k)
#pragma unroll
            for (int m = 0; m < Block::kM; ++m)
                wgmma<__half, Major::kK, Major::kK>(
                    scores[m],
                    Tokens::k_major(tokens + chunk * Block::kTokenChunkBytes, row0 + m * 64) +
                        Tokens::k_step(k),
                    Codes::k_major(stages + at.stage * Block::kChunkBytes) + Codes::k_step(k),
                    chunk > 0 || k > 0);
        wgmma_commit();
        if (chunk == 0) continue;
        wgmma_wait<1>();
        if (lane == 0) barriers.release(before);
        before.advance();
    }
    wgmma_wait<0>();
}

template <class Block, class T>
__device__ void vq_consume(const VqLookupParams& p, const VqCodebook<T>& codebook,
                           const VqPrepared& prepared, unsigned char* shared, unsigned char* stages,
                           PipelineBarriers<Block::kStages> barriers, int group) {
    using Candidates = typename Block::Candidates;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    auto& list =
        reinterpret_cast<typename Candidates::Shared*>(stages + Block::kLists)[group * 4 + warp];
    const int row0 = group * 64 * Block::kM;
    const auto row = [&](int i) { return row0 + i / 16 * 64 + warp * 16 + i % 16; };
    vq_load_tokens<Block, T>(p, prepared, codebook.vectors, shared, list, lane, row);
    fence_proxy_async();
    named_barrier_sync(1 + group, 128);
    Candidates candidates(list, lane);
    const auto* half_norms =
        reinterpret_cast<const float*>(stages + Block::kStages * Block::kChunkBytes);
    float scores[Block::kM][Block::kTileCodes / 8][4];
    PipelineState<Block::kStages> at, before;
    for (int tile = 0; tile < prepared.num_tiles; ++tile) {
        const VqTile bounds = prepared.tiles[tile];  // long before they are needed
        vq_multiply_tile<Block>(scores, shared_address(shared), shared_address(stages), row0,
                                prepared.num_chunks, barriers, at, before, lane);
        candidates.add(scores, bounds, half_norms + before.stage * Block::kTileCodes,
                       tile * Block::kTileCodes);
        fence_proxy_async();  // lanes read half norms, in whose place a bulk copy writes next
        __syncwarp();
        if (lane == 0) barriers.release(before);
        before.advance();
    }
    candidates.finish();
    vq_rerank_tokens<Block>(p, codebook, list, lane, row);
}

template <class Block, class T>
__global__ void __launch_bounds__(Block::kThreads, 1)
    vq_lookup_hopper_kernel(const VqLookupParams p, const VqCodebook<T> codebook,
                            const VqPrepared prepared) {
    if constexpr (kHopperCode) {
        extern __shared__ __align__(1024) unsigned char shared[];
        unsigned char* stages = shared + prepared.num_chunks * Block::kTokenChunkBytes;
        const PipelineBarriers<Block::kStages> barriers{shared_address(stages) + Block::kBarriers};
        if (threadIdx.x == 0) {
            barriers.init(1, Block::kGroups * 4);
            fence_mbarrier_init();
        }
        __syncthreads();
        const int warpgroup = warp_uniform(threadIdx.x / 128);
        if (warpgroup == 0) {
            if constexpr (Block::kGroups > 1) decrease_registers<Block::kProducerRegisters>();
            if (threadIdx.x == 0) vq_produce<Block>(prepared, shared_address(stages), barriers);
        } else {
            if constexpr (Block::kGroups > 1) increase_registers<Block::kConsumerRegisters>();
            vq_consume<Block>(p, codebook, prepared, shared, stages, barriers, warpgroup - 1);
        }
    }
}

}  // namespace vlmkernels
