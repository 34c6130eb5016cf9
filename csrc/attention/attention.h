// attention: out = softmax(softmax_scale q k^T + mask) v, its gradient, and decoding against a KV
// cache, without materialising q k^T.
//   attention.h           what the kernels are given, and the launch declarations
//   attention_fwd.cuh     forward                 attention_bwd_dkdv.cuh, _bwd_dq.cuh  backward
//   attention_decode.cuh  split-KV decoding       instances/*.cu  one head_dim each
//   attention.cu          launchers: head_dim and dtype to instance
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

// Heads of a dense [batch, seqlen, num_heads, head_dim] or packed [num_tokens, num_heads, head_dim]
// tensor. Strides in elements; head_dim has stride 1. CUDA: 16-byte aligned rows.
struct HeadsView {
    void* data;
    int64_t batch_stride;  // 0 when packed
    int64_t token_stride;
    int64_t head_stride;
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
    int batch;
    int seqlen_q;          // longest, when packed
    int seqlen_k;          // longest, when packed; the capacity of a cache
    int64_t num_tokens_q;  // of the whole batch
    int64_t num_tokens_k;
    int num_heads;
    int num_heads_k;  // divides num_heads; query head h sees key head h / (num_heads / num_heads_k)
    int head_dim;
    float softmax_scale;  // > 0
    bool causal;          // bottom-right: query i sees keys j <= i + seqlen_k - seqlen_q
    DType dtype;
};

struct AttentionBackwardParams : AttentionParams {
    HeadsView dout;     // as out
    const float* dlse;  // as lse, or null
    float* delta;       // workspace of twice the size of lse: rowsum(out dout) - dlse, and more
    HeadsView dq;       // as q
    HeadsView dk;       // as k
    HeadsView dv;       // as v
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
Error launch_attention_backward(const AttentionBackwardParams& p, Stream stream);
Error launch_attention_decode(const AttentionDecodeParams& p, Stream stream);
// How many parts of the keys launch_attention_decode wants on the current device: a function of
// sizes only, so that a captured CUDA graph stays valid while the cache fills.
Error attention_decode_splits(const AttentionParams& p, int* num_splits);

template <class Isa>
void attention_fwd_cpu(const AttentionParams& p);
template <class Isa>
void attention_bwd_cpu(const AttentionBackwardParams& p);
template <class Isa>
void attention_decode_cpu(const AttentionParams& p);

}  // namespace vlmkernels
