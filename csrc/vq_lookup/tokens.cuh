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
    float x[kVqAtOnce][8], largest = 0, square = 0;
    bool valid = there;
    auto load_shifted = [&](int column) {
        load_blocks(z, column, p.dim, vectors, lane, x);
#pragma unroll
        for (int j = 0; j < kVqAtOnce; ++j) {
            if (column + j * 64 >= p.dim) break;
            float shift[8];
            load_eight(prepared.shift, column + j * 64 + lane * 8, p.dim, vectors, shift);
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                valid &= vq_valid(x[j][i]);
                x[j][i] -= shift[i];
            }
        }
    };
    for (int column = 0; column < p.dim; column += kVqAtOnce * 64) {
        load_shifted(column);
#pragma unroll
        for (int i = 0; i < kVqAtOnce * 8; ++i) {
            if (column + i / 8 * 64 >= p.dim) break;
            largest = fmaxf(largest, fabsf(x[i / 8][i % 8]));
            square = fmaf(x[i / 8][i % 8], x[i / 8][i % 8], square);
        }
    }
    valid = VqGroup::all(valid);
    largest = VqGroup::max(largest);
    const float scale = valid ? vq_scale(largest) : 1.0f;
    square = VqGroup::sum(square);
    auto element = [&](int i) {
        return valid ? (to_float(z[i]) - prepared.shift[i]) * scale : 0.0f;
    };
    for (int column0 = 0; column0 < columns; column0 += kVqAtOnce * 64) {
        if (p.dim > kVqAtOnce * 64) load_shifted(column0);  // otherwise x still is
#pragma unroll
        for (int j = 0; j < kVqAtOnce; ++j) {
            const int column = column0 + j * 64 + lane * 8;
            if (column >= columns) break;
            Vector<__half, 8> eight;
#pragma unroll
            for (int i = 0; i < 8; ++i)
                eight.x[i] = prepared.split ? split_column<true>(column + i, p.dim, element)
                                            : __float2half_rn(valid ? x[j][i] * scale : 0.0f);
            *reinterpret_cast<Vector<__half, 8>*>(
                tokens + column / Block::kChunk * Block::kTokenChunkBytes +
                Layout::offset(row, column % Block::kChunk / 8)) = eight;
        }
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
