// For sm_80 and later: a CTA holds a block of tokens in shared memory and streams the codebook past
// it, in chunks of kChunk columns of a tile of codes, kStages in flight. A warp owns 16 kM tokens.
#pragma once

#include "common/launch.cuh"
#include "vq_lookup/tokens.cuh"

namespace vlmkernels {

template <int kM_, int kWarps_, int kMostDim_>
struct VqBlock {
    static constexpr int kM = kM_, kMostDim = kMostDim_, kStages = 3, kSlots = 12;
    static constexpr int kWarps = kWarps_, kThreads = 32 * kWarps, kTokens = 16 * kM * kWarps;
    static constexpr int kChunk = VqPrepared::kChunk, kTileCodes = VqPrepared::kTileCodes;
    static constexpr int kTokenChunkBytes = kTokens * kChunk * 2;
    static constexpr int kStageBytes = VqPrepared::kChunkBytes + kTileCodes * 4;  // and half norms
    using Candidates = VqCandidates<kM, kSlots>;
    static int shared_bytes(int chunks) {
        return chunks * kTokenChunkBytes + kStages * kStageBytes +
               kWarps * int(sizeof(typename Candidates::Shared));
    }
};

// Copies chunk `step` (of all chunks of all tiles) and, with a tile's last, its half norms.
template <class Block>
__device__ void vq_load_stage(const VqPrepared& prepared, uint32_t stage, int step, int thread) {
    constexpr int kBytes = VqPrepared::kChunkBytes;
    const auto* from =
        reinterpret_cast<const unsigned char*>(prepared.codes) + int64_t(step) * kBytes;
#pragma unroll
    for (int i = 0; i < kBytes; i += Block::kThreads * 16)
        cp_async(stage + i + thread * 16, from + i + thread * 16);
    const int tile = step / prepared.num_chunks;
    if (step - tile * prepared.num_chunks == prepared.num_chunks - 1 && thread < 32)
        cp_async(stage + kBytes + thread * 16,
                 prepared.half_norms + tile * Block::kTileCodes + thread * 4);
}

// scores += tokens (chunk of this warp's) codes^T.
template <class Block>
__device__ void vq_multiply(float (&scores)[Block::kM][Block::kTileCodes / 8][4], uint32_t tokens,
                            uint32_t codes, int warp, int lane) {
    constexpr int kM = Block::kM, kJ = Block::kTileCodes / 16, kK = Block::kChunk / 16;
    const FragmentLoader<Block::kChunk, Operand::kA> load_a(lane);
    const FragmentLoader<Block::kChunk, Operand::kB> load_b(lane);
    uint32_t a[kM][4], b[2][4];
    load_b(b[0], codes, 0, 0);
#pragma unroll
    for (int k = 0; k < kK; ++k) {
#pragma unroll
        for (int m = 0; m < kM; ++m) load_a(a[m], tokens, (warp * kM + m) * 16, k * 2);
#pragma unroll
        for (int j = 0; j < kJ; ++j) {
            const int next = k * kJ + j + 1;
            if (next < kK * kJ) load_b(b[next % 2], codes, next % kJ * 16, next / kJ * 2);
            const uint32_t (&now)[4] = b[(next - 1) % 2];
#pragma unroll
            for (int m = 0; m < kM; ++m) {
                mma(scores[m][j * 2], a[m], now[0], now[1], __half());
                mma(scores[m][j * 2 + 1], a[m], now[2], now[3], __half());
            }
        }
    }
}

template <class Block, class T>
__global__ void __launch_bounds__(Block::kThreads, 1)
    vq_lookup_kernel(const VqLookupParams p, const VqCodebook<T> codebook,
                     const VqPrepared prepared) {
    using Candidates = typename Block::Candidates;
    constexpr int kStages = Block::kStages;
    extern __shared__ __align__(1024) unsigned char shared[];
    unsigned char* stages = shared + prepared.num_chunks * Block::kTokenChunkBytes;
    auto* lists =
        reinterpret_cast<typename Candidates::Shared*>(stages + kStages * Block::kStageBytes);
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    const auto row = [&](int i) { return warp * Candidates::kTokens + i; };
    const int steps = prepared.num_tiles * prepared.num_chunks;
    const uint32_t stage0 = shared_address(stages);
    auto load_stage = [&](int step) {
        if (step < steps)
            vq_load_stage<Block>(prepared, stage0 + step % kStages * Block::kStageBytes, step,
                                 thread);
        cp_async_commit();
    };
    for (int step = 0; step < kStages - 1; ++step) load_stage(step);
    vq_load_tokens<Block, T>(p, prepared, codebook.vectors, shared, lists[warp], lane, row);
    __syncwarp();
    Candidates candidates(lists[warp], lane);
    float scores[Block::kM][Block::kTileCodes / 8][4] = {};
    int chunk = 0;
    for (int step = 0; step < steps; ++step) {
        cp_async_wait<kStages - 2>();
        __syncthreads();  // this stage is there, and the one before it is free
        load_stage(step + kStages - 1);
        const int slot = step % kStages;
        vq_multiply<Block>(scores, shared_address(shared) + chunk * Block::kTokenChunkBytes,
                           stage0 + slot * Block::kStageBytes, warp, lane);
        if (++chunk < prepared.num_chunks) continue;
        chunk = 0;
        const int tile = step / prepared.num_chunks;
        candidates.add(scores, prepared.tiles[tile],
                       reinterpret_cast<const float*>(stages + slot * Block::kStageBytes +
                                                      VqPrepared::kChunkBytes),
                       tile * Block::kTileCodes);
#pragma unroll
        for (int m = 0; m < Block::kM; ++m)
#pragma unroll
            for (int n = 0; n < Block::kTileCodes / 8; ++n)
                scores[m][n][0] = scores[m][n][1] = scores[m][n][2] = scores[m][n][3] = 0;
    }
    candidates.finish();
    vq_rerank_tokens<Block>(p, codebook, lists[warp], lane, row);
}

}  // namespace vlmkernels
