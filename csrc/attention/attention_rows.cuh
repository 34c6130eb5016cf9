// Kernels over rows, that is one head of one query each: what the backward needs to know of them,
// and the combination of what the splits of a decoding found. And one over tokens: their ids.
#pragma once

#include <cuda_runtime.h>

#include "attention/mask.cuh"
#include "common/launch.cuh"
#include "common/mma.cuh"

namespace vlmkernels {

// Writes row_stats: 8 lanes per row of out, heads of a token next to each other as in memory.
template <class Element>
__global__ void __launch_bounds__(256) attention_row_stats_kernel(const AttentionBackwardParams p) {
    const int64_t num_tokens = p.cu_seqlens_q ? p.num_tokens_q : p.seqlen_q;
    const int64_t index = (int64_t(blockIdx.x) * 256 + threadIdx.x) / 8;
    const int64_t token = index / p.num_heads % num_tokens;
    const int64_t head = index % p.num_heads, batch = index / p.num_heads / num_tokens;
    const bool valid = batch < (p.cu_seqlens_q ? 1 : p.batch);
    auto row = [&](const HeadsView& view) {
        return static_cast<const Element*>(view.data) + batch * view.batch_stride +
               token * view.token_stride + head * view.head_stride;
    };
    float sum = 0;
    const bool given = p.given_delta;
    for (int chunk = threadIdx.x % 8; valid && !given && chunk * 8 < p.head_dim; chunk += 8) {
        const uint4 out = *reinterpret_cast<const uint4*>(row(p.out) + chunk * 8);
        const uint4 dout = *reinterpret_cast<const uint4*>(row(p.dout) + chunk * 8);
#pragma unroll
        for (int i = 0; i < 8; ++i)
            sum += float(reinterpret_cast<const Element*>(&out)[i]) *
                   float(reinterpret_cast<const Element*>(&dout)[i]);
    }
    for (int offset = 4; offset > 0; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
    if (!valid || threadIdx.x % 8) return;
    const int64_t at = batch * p.lse_batch_stride + head * p.lse_head_stride + token;
    const bool blind = p.lse[at] == negative_infinity();  // sees no key: p = 0, whatever dlse is
    row_stats(p)[at] =
        blind ? make_float2(-negative_infinity(), 0)
              : make_float2(p.lse[at] * kLog2e,
                            given ? p.given_delta[at] : sum - (p.dlse ? p.dlse[at] : 0));
}

template <class Element>
Error attention_row_stats(const AttentionBackwardParams& p, Stream stream) {
    return launch(attention_row_stats_kernel<Element>, (p.num_tokens_q * p.num_heads + 31) / 32,
                  256, 0, stream, p);
}

// Writes id_ranges: a warp per block of kIdBlock tokens, those of q before those of k. A token that
// is in no image does not count for the images, nor one that sees no key for the spans' union.
__global__ void __launch_bounds__(128) attention_id_ranges_kernel(const AttentionParams p) {
    const int64_t blocks_q = id_blocks(p.num_tokens_q),
                  block = int64_t(blockIdx.x) * 4 + threadIdx.x / 32;
    if (block >= blocks_q + id_blocks(p.num_tokens_k)) return;
    const bool is_q = block < blocks_q;
    const int64_t num_tokens = is_q ? p.num_tokens_q : p.num_tokens_k;
    const int32_t* segments = is_q ? p.segments.q : p.segments.k;
    const int32_t* images = is_q ? p.images.q : p.images.k;
    IdRange range = IdRange::empty();
    for (int i = threadIdx.x % 32; i < kIdBlock; i += 32) {
        const int64_t token = (is_q ? block : block - blocks_q) * kIdBlock + i;
        if (token >= num_tokens) break;
        if (p.spans) {
            if (!is_q) break;
            const int2 span = reinterpret_cast<const int2*>(p.spans)[token];
            const bool empty = span.x >= span.y;
            range.add({empty ? INT32_MAX : span.x, empty ? INT32_MAX : span.x,
                       empty ? INT32_MIN : span.y, empty ? INT32_MIN : span.y});
            continue;
        }
        const int segment = segments ? segments[token] : 0, image = images ? images[token] : -1;
        range.add({segment, segment, image < 0 ? INT32_MAX : image, image < 0 ? INT32_MIN : image});
    }
    range = {__reduce_min_sync(~0u, range.segment_min), __reduce_max_sync(~0u, range.segment_max),
             __reduce_min_sync(~0u, range.image_min), __reduce_max_sync(~0u, range.image_max)};
    if (threadIdx.x % 32 == 0)
        reinterpret_cast<int4*>(p.id_ranges)[block] =
            make_int4(range.segment_min, range.segment_max, range.image_min, range.image_max);
}

inline Error attention_id_ranges(const AttentionParams& p, Stream stream) {
    if (!p.has_ids()) return cudaSuccess;
    const int64_t blocks = id_blocks(p.num_tokens_q) + id_blocks(p.num_tokens_k);
    return launch(attention_id_ranges_kernel, (blocks + 3) / 4, 128, 0, stream, p);
}

// out = sum_s exp(lse_s - lse) out_s over the splits: a warp per row.
template <class Element>
__global__ void __launch_bounds__(128) attention_combine_kernel(const AttentionDecodeParams p) {
    const int64_t num_rows = int64_t(p.batch) * p.seqlen_q * p.num_heads;
    const int64_t row = int64_t(blockIdx.x) * 4 + threadIdx.x / 32;
    if (row >= num_rows) return;
    const int lane = threadIdx.x % 32;
    const int64_t token = row / p.num_heads, head = row % p.num_heads;
    const int64_t batch = token / p.seqlen_q, query = token % p.seqlen_q;
    const int64_t at = batch * p.lse_batch_stride + head * p.lse_head_stride + query;
    auto lse_of = [&](int split) { return p.partial_lse[split * num_rows + at]; };
    float max = negative_infinity(), sum = 0;
    for (int split = 0; split < p.num_splits; ++split) max = fmaxf(max, lse_of(split));
    const float offset = max == negative_infinity() ? 0 : max;
    for (int split = 0; split < p.num_splits; ++split) sum += expf(lse_of(split) - offset);
    const float inverse = sum > 0 ? 1 / sum : sum;
    if (lane == 0) p.lse[at] = sum == 0 ? max : max + logf(sum);
    Element* out = static_cast<Element*>(p.out.data) + batch * p.out.batch_stride +
                   query * p.out.token_stride + head * p.out.head_stride;
    for (int column = lane * 2; column < p.head_dim; column += 64) {
        float x = 0, y = 0;
        for (int split = 0; split < p.num_splits; ++split) {
            const float weight = expf(lse_of(split) - offset) * inverse;
            const float2 part = *reinterpret_cast<const float2*>(
                p.partial_out + (split * num_rows + row) * p.head_dim + column);
            x += part.x * weight;
            y += part.y * weight;
        }
        *reinterpret_cast<uint32_t*>(out + column) = pack<Element>(x, y);
    }
}

template <class Element>
Error attention_combine(const AttentionDecodeParams& p, Stream stream) {
    const int64_t rows = int64_t(p.batch) * p.seqlen_q * p.num_heads;
    return launch(attention_combine_kernel<Element>, (rows + 3) / 4, 128, 0, stream, p);
}

}  // namespace vlmkernels
