// Writes new keys and values into a KV cache and rotates keys and queries on the way: a thread for
// 8 elements of a row, or for the two times 8 that are rotated with each other.
#pragma once

#include <cuda_runtime.h>

#include "attention/cache_append.h"
#include "common/launch.cuh"
#include "common/vector.cuh"

namespace vlmkernels {

// Where a token of a row of a cache is.
template <class T>
__device__ T* cache_token(const CacheAppendParams& p, const HeadsView& view, int batch, int token,
                          int head) {
    int64_t row = batch;
    if (p.block_table) {
        row = p.block_table[batch * p.block_table_stride + token / int(p.page_size)];
        token %= int(p.page_size);
    }
    return static_cast<T*>(view.data) + row * view.batch_stride + token * view.token_stride +
           head * view.head_stride;
}

template <class T>
__device__ T* new_token(const HeadsView& view, int batch, int token, int head) {
    return static_cast<T*>(view.data) + batch * view.batch_stride + token * view.token_stride +
           head * view.head_stride;
}

// Elements [column, column + 8) of a row, and those that they are rotated with.
template <class T, class Table>
__device__ void rotate(const CacheAppendParams& p, const T* from, T* to, int column, int rotary_dim,
                       int position) {
    float x[8], y[8];
    if (column >= rotary_dim) {
        load(from + column, x);
        return store(to + column, x);
    }
    const int half = rotary_dim / 2;
    const Table* cos = static_cast<const Table*>(p.cos) + position * p.cos_stride;
    const Table* sin = static_cast<const Table*>(p.sin) + position * p.sin_stride;
    if (p.interleaved) {
        load(from + column, x);
#pragma unroll
        for (int i = 0; i < 8; i += 2) {
            const float c = to_float(cos[(column + i) / 2]), s = to_float(sin[(column + i) / 2]);
            const float a = x[i], b = x[i + 1];
            x[i] = a * c - b * s, x[i + 1] = a * s + b * c;
        }
        return store(to + column, x);
    }
    if (column >= half) return;  // with its partner
    load(from + column, x);
    load(from + column + half, y);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const float c = to_float(cos[column + i]), s = to_float(sin[column + i]);
        const float a = x[i], b = y[i];
        x[i] = a * c - b * s, y[i] = a * s + b * c;
    }
    store(to + column, x);
    store(to + column + half, y);
}

template <class T, class Table>
__global__ void __launch_bounds__(128) cache_append_kernel(const CacheAppendParams p) {
    const int chunks = p.head_dim / 8, heads = p.num_heads + 2 * p.num_heads_k;
    const int tokens = max(p.seqlen_q, p.seqlen_new);
    int64_t index = int64_t(blockIdx.x) * 128 + threadIdx.x;
    const int column = index % chunks * 8;
    index /= chunks;
    const int head = index % heads;
    index /= heads;
    const int token = index % tokens;
    if (index / tokens >= p.batch) return;
    const int batch = index / tokens;
    const bool is_q = head < p.num_heads, is_v = head >= p.num_heads + p.num_heads_k;
    const int length = max(0, min(p.cache_seqlens[batch], p.capacity));
    const int position = length + (is_q && p.one_position ? 0 : token);
    if (is_q) {
        if (token < p.seqlen_q)
            rotate<T, Table>(p, new_token<const T>(p.q, batch, token, head),
                             new_token<T>(p.q_out, batch, token, head), column, p.rotary_dim,
                             min(position, p.capacity - 1));
        return;
    }
    if (token >= p.seqlen_new || position >= p.capacity) return;
    const int head_k = (head - p.num_heads) % p.num_heads_k;
    rotate<T, Table>(p, new_token<const T>(is_v ? p.v : p.k, batch, token, head_k),
                     cache_token<T>(p, is_v ? p.v_cache : p.k_cache, batch, position, head_k),
                     column, is_v ? 0 : p.rotary_dim, position);
}

template <class T>
Error cache_append(const CacheAppendParams& p, Stream stream) {
    const int64_t rows =
        int64_t(p.batch) * max(p.seqlen_q, p.seqlen_new) * (p.num_heads + 2 * p.num_heads_k);
    const int64_t blocks = (rows * (p.head_dim / 8) + 127) / 128;
    if (p.table_dtype == DType::kFloat32)
        return launch(cache_append_kernel<T, float>, blocks, 128, 0, stream, p);
    return launch(cache_append_kernel<T, T>, blocks, 128, 0, stream, p);
}

}  // namespace vlmkernels
