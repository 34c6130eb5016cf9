// What both kernels do with a block of tokens: bring it to shared memory, and write its results.
#pragma once

#include "vq_lookup/rerank.cuh"

namespace vlmkernels {

// One token by eight lanes: scaled and in fp16 to row `row` of the block, with
// the list `list` of the warp. Called by whole warps.
template <class Block, class T>
__device__ void vq_load_token(const VqLookupParams& p, const VqPrepared& prepared, bool vectors,
                              int64_t token, int row, unsigned char* tokens,
                              typename Block::Candidates::Shared& shared, int list, int lane) {
    using Layout = VqPrepared::Layout;
    const bool there = token < p.num_tokens;
    const T* z = static_cast<const T*>(p.z) + (there ? token * p.dim : 0);
    const int columns = prepared.num_chunks * Block::kChunk;
    float x[Block::kMostDim / 64][8], largest = 0, square = 0;
    bool valid = there;
#pragma unroll
    for (int j = 0; j < Block::kMostDim / 64; ++j) {
        const int column = j * 64 + lane * 8;
        if (column >= p.dim) continue;
        load_eight(z, column, p.dim, vectors, x[j]);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            valid = valid && vq_valid(x[j][i]);
            if (column + i < p.dim) x[j][i] -= prepared.shift[column + i];
            largest = fmaxf(largest, fabsf(x[j][i]));
            square = fmaf(x[j][i], x[j][i], square);
        }
    }
    valid = VqGroup::all(valid);
    largest = VqGroup::max(largest);
    const float scale = valid ? vq_scale(largest) : 1.0f;
    square = VqGroup::sum(square);
    auto element = [&](int i) {
        return valid ? (to_float(z[i]) - prepared.shift[i]) * scale : 0.0f;
    };
#pragma unroll
    for (int j = 0; j < Block::kMostDim / 64; ++j) {
        const int column = j * 64 + lane * 8;
        if (column >= columns) continue;
        Vector<__half, 8> eight;
#pragma unroll
        for (int i = 0; i < 8; ++i)
            eight.x[i] = prepared.split
                             ? split_column<true>(column + i, p.dim, element)
                             : __float2half_rn(valid && column < p.dim ? x[j][i] * scale : 0.0f);
        *reinterpret_cast<Vector<__half, 8>*>(
            tokens + column / Block::kChunk * Block::kTokenChunkBytes +
            Layout::offset(row, column % Block::kChunk / 8)) = eight;
    }
    if (lane == 0) {
        shared.count[list] = valid ? 0 : Block::Candidates::kInvalid;
        shared.scale[list] = scale;
        shared.norm[list] = sqrtf(square) * scale * 1.0001f;
    }
}

// row(i): where the block has token i of the warp.
template <class Block, class T, class Row>
__device__ void vq_load_tokens(const VqLookupParams& p, const VqPrepared& prepared, bool vectors,
                               unsigned char* tokens, typename Block::Candidates::Shared& shared,
                               int lane, Row&& row) {
    for (int i = lane / VqGroup::kLanes; i < Block::Candidates::kTokens; i += 4)
        vq_load_token<Block, T>(p, prepared, vectors, int64_t(blockIdx.x) * Block::kTokens + row(i),
                                row(i), tokens, shared, i, lane % VqGroup::kLanes);
}

template <class Block, class T, class Row>
__device__ void vq_rerank_tokens(const VqLookupParams& p, const VqCodebook<T>& codebook,
                                 const typename Block::Candidates::Shared& shared, int lane,
                                 Row&& row) {
    for (int i = lane / VqGroup::kLanes; i < Block::Candidates::kTokens; i += 4)
        vq_rerank<T, typename Block::Candidates>(p, codebook, shared, i,
                                                 int64_t(blockIdx.x) * Block::kTokens + row(i),
                                                 lane % VqGroup::kLanes);
}

}  // namespace vlmkernels
