// kv_cache_append: what its kernels are given.
#pragma once

#include "attention/attention.h"

namespace vlmkernels {

// New tokens on their way into a KV cache, rotated, and q rotated with them.
struct CacheAppendParams {
    HeadsView q, q_out;            // [batch, seqlen_q, num_heads, head_dim]; null: no q
    HeadsView k, v;                // [batch, seqlen_new, num_heads_k, head_dim]
    HeadsView k_cache, v_cache;    // [batch, capacity, num_heads_k, head_dim], or pages
    const int32_t* cache_seqlens;  // [batch] where the new tokens begin
    const int32_t* block_table;    // as in AttentionParams
    int64_t block_table_stride;
    int64_t page_size;
    const void *cos, *sin;  // [capacity or more, rotary_dim / 2]; null: nothing is rotated
    int64_t cos_stride, sin_stride;
    DType table_dtype;  // float32 or dtype
    bool interleaved;   // pairs are (2 i, 2 i + 1), else (i, i + rotary_dim / 2)
    bool one_position;  // all of q is at cache_seqlens, else token i at cache_seqlens + i
    int batch, seqlen_q, seqlen_new, capacity;
    int num_heads;  // 0: no q
    int num_heads_k;
    int head_dim;
    int rotary_dim;  // a multiple of 16 up to head_dim; 0: nothing is rotated
    DType dtype;
};

Error launch_cache_append(const CacheAppendParams& p, Stream stream);

template <class Isa>
void cache_append_cpu(const CacheAppendParams& p);

}  // namespace vlmkernels
