// Which rows of which tensors a CTA of an attention kernel works on, and which keys a query sees.
#pragma once

#include <cstdint>

#include "attention/attention.h"
#include "common/ptx.cuh"
#include "common/softmax.cuh"

namespace vlmkernels {

// A block of rows of one head of one sequence, from a linear grid with blocks varying fastest.
struct BlockOfHead {
    int block, head, batch;

    __device__ BlockOfHead(int num_blocks, int num_heads)
        : BlockOfHead(blockIdx.x, num_blocks, num_heads) {}
    __device__ BlockOfHead(int index, int num_blocks, int num_heads) {
        block = index % num_blocks;
        head = index / num_blocks % num_heads;
        batch = index / num_blocks / num_heads;
    }
};

// A run of tokens, or of tiles: [begin, end).
struct Span {
    int begin, end;
};

struct Sequence {
    int batch;
    int start_q, start_k;  // first token; 0 when dense
    int seqlen_q, seqlen_k;
    const int &window_left, &window_right;  // of the params: no registers

    __device__ Sequence(const AttentionParams& p, int batch)
        : batch(batch),
          start_q(0),
          start_k(0),
          seqlen_q(p.seqlen_q),
          seqlen_k(p.seqlen_k),
          window_left(p.window_left),
          window_right(p.window_right) {
        if (p.cu_seqlens_q) {
            start_q = p.cu_seqlens_q[batch];
            start_k = p.cu_seqlens_k[batch];
            seqlen_q = min(p.cu_seqlens_q[batch + 1] - start_q, p.seqlen_q);
            seqlen_k = min(p.cu_seqlens_k[batch + 1] - start_k, p.seqlen_k);
        }
        if (p.cache_seqlens) seqlen_k = max(0, min(p.cache_seqlens[batch], p.seqlen_k));
    }

    // The keys in the window of query i.
    __device__ Span keys_of(int i) const {
        const int diagonal = i + seqlen_k - seqlen_q;
        return {window_left < 0 ? 0 : max(0, diagonal - window_left),
                window_right < 0 ? seqlen_k : max(0, min(diagonal + window_right + 1, seqlen_k))};
    }
    // The queries in whose window key j is.
    __device__ Span queries_of(int j) const {
        const int diagonal = j - seqlen_k + seqlen_q;
        return {window_right < 0 ? 0 : max(0, diagonal - window_right),
                window_left < 0 ? seqlen_q : max(0, min(diagonal + window_left + 1, seqlen_q))};
    }
    // Of full and causal attention: query i sees the keys before visible_keys(i).
    __device__ int visible_keys(int i) const { return keys_of(i).end; }
    __device__ int first_query(int j) const { return queries_of(j).begin; }

    template <class T>
    __device__ T* queries(const HeadsView& view, int row, int head) const {
        return at<T>(view, start_q + row, head);
    }
    template <class T>
    __device__ T* keys(const HeadsView& view, int row, int head) const {
        return at<T>(view, start_k + row, head);
    }
    // Index of row `row` of `head` in lse and what has its layout.
    __device__ int64_t lse_index(const AttentionParams& p, int row, int head) const {
        return batch * p.lse_batch_stride + head * p.lse_head_stride + start_q + row;
    }

  private:
    template <class T>
    __device__ T* at(const HeadsView& view, int64_t token, int head) const {
        return static_cast<T*>(view.data) + batch * view.batch_stride + token * view.token_stride +
               head * view.head_stride;
    }
};

// The queries of a CTA, and those of the calling warp. Kernels make it a second time for their
// epilogue: nothing of it then has to stay in registers over the main loop.
template <class Tile>
struct QueryBlock {
    const BlockOfHead work;
    const Sequence sequence;
    const int head, row0;  // of the CTA
    const int thread, lane, warp_row;

    __device__ explicit QueryBlock(const AttentionParams& p) : QueryBlock(p, num_blocks(p)) {}
    __device__ int num_rows() const { return sequence.seqlen_q - row0; }
    static constexpr int num_blocks(const AttentionParams& p) {
        return (p.seqlen_q + Tile::kBlockM - 1) / Tile::kBlockM;
    }

  private:
    // Causal: the last block sees the most keys; it is the first to start.
    __device__ QueryBlock(const AttentionParams& p, int blocks)
        : work(blocks, p.num_heads),
          sequence(p, work.batch),
          head(work.head),
          row0((p.causal() ? blocks - 1 - work.block : work.block) * Tile::kBlockM),
          thread(thread_in_block()),
          lane(thread % 32),
          warp_row(thread / 32 * Tile::kMTiles * 16) {}
};

// What the backward kernels need of each row of q, at its index in lse: lse log2(e), +inf where the
// row sees no key (so that p = 0), and delta.
__device__ inline float2* row_stats(const AttentionBackwardParams& p) {
    return reinterpret_cast<float2*>(p.delta);
}

}  // namespace vlmkernels
