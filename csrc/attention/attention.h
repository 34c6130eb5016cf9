// attention: out = softmax(cap(softmax_scale q k^T) + bias + mask) v, its gradient, and decoding
// against a KV cache, without materialising q k^T.
//   attention.h           what the kernels are given, and the launch declarations
//   mask.cuh              what happens to scores before softmax, and which tiles are skipped
//   attention_fwd.cuh     forward                 attention_bwd_{dkdv,dq,dbias}.cuh  backward
//   attention_decode.cuh  split-KV decoding       instances/*.cu  one head_dim each
//   attention.cu          launchers: head_dim, dtype and mask to instance
//   attention_cpu*.cpp    CPU kernels, compiled once per instruction set
//   attention.cpp         argument checks and binding
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/launch.h"

namespace vlmkernels {

inline constexpr int kMaxHeadDim = 256;  // any multiple of 8 up to this
// Columns of the compiled CUDA tiles: a head_dim takes the next one, the rest is zero-filled on the
// way to shared memory, never read.
inline constexpr int kAttentionTileDims[] = {32, 64, 80, 96, 112, 128, 192, 256};
inline constexpr int kMaskedTileDims[] = {64, 96, 128, 256};  // where the mask is not plain
inline constexpr int kIdBlock = 64;      // tokens that one row of id_ranges describes
inline constexpr int kOrderedRows = 64;  // of a tile at least, for a tile_order

// Heads of a dense [batch, seqlen, num_heads, head_dim] or packed [num_tokens, num_heads, head_dim]
// tensor. Strides in elements; head_dim has stride 1. CUDA: 16-byte aligned rows.
struct HeadsView {
    void* data;
    int64_t batch_stride;  // 0 when packed
    int64_t token_stride;
    int64_t head_stride;
};

// Scores that are added to those of q and k, or their gradient. Strides in elements; keys have
// stride 1, broadcast dimensions stride 0.
struct BiasView {
    void* data;  // [batch, num_heads, seqlen_q, seqlen_k]; null: none
    int64_t batch_stride;
    int64_t head_stride;
    int64_t query_stride;
    int batch;      // 1, or that of the params
    int num_heads;  // 1, or that of the params
    int seqlen_q;   // at least that of the params
    int seqlen_k;   // at least that of the params
    DType dtype;    // float32, or that of q
};

// An integer for each token: [batch, seqlen], packed [num_tokens], contiguous. Null: all the same.
struct TokenIds {
    const int32_t* q;
    const int32_t* k;
};

struct AttentionParams {
    HeadsView q;               // [batch, seqlen_q, num_heads, head_dim]
    HeadsView k;               // [batch, seqlen_k, num_heads_k, head_dim]
    HeadsView v;               // [batch, seqlen_k, num_heads_k, head_dim]
    HeadsView out;             // [batch, seqlen_q, num_heads, head_dim]
    float* lse;                // [batch, num_heads, seqlen_q], packed [num_heads, num_tokens_q]
    int64_t lse_batch_stride;  // 0 when packed
    int64_t lse_head_stride;
    const int32_t* cu_seqlens_q;   // [batch + 1] when packed, else null
    const int32_t* cu_seqlens_k;   // [batch + 1] when packed, else null
    const int32_t* cache_seqlens;  // [batch] valid keys of each row of a KV cache, else null
    const int32_t* block_table;    // [batch, pages] rows of a paged cache, whose batch is pages
    int64_t block_table_stride;
    int64_t page_size;  // a multiple of 16
    int batch;
    int seqlen_q;          // longest, when packed
    int seqlen_k;          // longest, when packed; the capacity of a cache
    int64_t num_tokens_q;  // of the whole batch
    int64_t num_tokens_k;
    int num_heads;
    int num_heads_k;  // divides num_heads; query head h sees key head h / (num_heads / num_heads_k)
    int head_dim;
    float softmax_scale;  // > 0
    DType dtype;

    // Query i sees key j when their segments are equal and j is in the window of i, or in the same
    // image: -left <= j - (i + seqlen_k - seqlen_q) <= right, or images equal and not negative.
    int window_left, window_right;  // -1: unbounded; causal is right 0
    TokenIds segments;
    TokenIds images;
    // In place of all that: query i sees the keys from spans[i][0] to before spans[i][1].
    const int32_t* spans;  // [batch, seqlen_q, 2], packed [num_tokens_q, 2], contiguous; or null
    int32_t* id_ranges;    // CUDA workspace if has_ids(): [id_blocks(q) + id_blocks(k), 4]
    int32_t* tile_order;   // CUDA workspace when packed: [1 + tile_slots, 2]; the first row: how
                           // many follow, each a (block, sequence). Null: all blocks of all
    int tile_slots;
    float softcap;  // cap(s) = softcap tanh(s / softcap); 0: cap(s) = s
    BiasView bias;
    bool float32_out;  // out, or dq, dk, dv, are float32 whatever dtype is: parts of a sum

    constexpr bool causal() const { return window_right == 0; }
    // Is a mask read from memory, token by token?
    constexpr bool has_ids() const { return segments.q || images.q || spans; }
    // Full or causal, and nothing done to the scores.
    constexpr bool plain() const {
        return window_left < 0 && window_right <= 0 && !has_ids() && softcap == 0 && !bias.data;
    }
};

// Rows of id_ranges for so many tokens.
constexpr int64_t id_blocks(int64_t num_tokens) { return (num_tokens + kIdBlock - 1) / kIdBlock; }

// Tiles of kOrderedRows or more that sequences can have.
constexpr int64_t tile_slots(int64_t num_tokens, int64_t batch) {
    return num_tokens / kOrderedRows + batch;
}

struct AttentionBackwardParams : AttentionParams {
    HeadsView dout;            // as out
    const float* dlse;         // as lse, or null
    const float* given_delta;  // as lse: rowsum(out dout) - dlse; null: from out, dout and dlse
    float* delta;              // workspace of twice the size of lse: delta, and more
    HeadsView dq;              // as q
    HeadsView dk;              // as k
    HeadsView dv;              // as v
    BiasView dbias;            // as bias, contiguous, each element written; or null
};

struct AttentionDecodeParams : AttentionParams {
    int num_splits;      // parts of the keys that different CTAs take
    float* partial_out;  // [num_splits, batch, seqlen_q, num_heads, head_dim]; null if one split
    float* partial_lse;  // [num_splits, batch, num_heads, seqlen_q]; null if one split
};

Error launch_attention(const AttentionParams& p, Stream stream);
// Whether the Hopper kernels take this, on this GPU; else those of sm_80 do.
bool takes_sm90(const AttentionParams& p);
bool takes_sm90(const AttentionBackwardParams& p);
Error launch_attention_sm90(const AttentionParams& p, Stream stream);
Error launch_attention_backward_sm90(const AttentionBackwardParams& p, Stream stream);
Error launch_attention_dbias_sm90(const AttentionBackwardParams& p, Stream stream);
Error launch_attention_backward(const AttentionBackwardParams& p, Stream stream);
Error launch_attention_decode(const AttentionDecodeParams& p, Stream stream);
// How many parts of the keys launch_attention_decode wants on the current device: a function of
// sizes only, so that a captured CUDA graph stays valid while the cache fills.
int attention_decode_splits(const AttentionParams& p);

template <class Isa>
void attention_fwd_cpu(const AttentionParams& p);
template <class Isa>
void attention_bwd_cpu(const AttentionBackwardParams& p);
template <class Isa>
void attention_decode_cpu(const AttentionParams& p);

}  // namespace vlmkernels
