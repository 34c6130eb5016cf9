// The angles of a Rotation on the GPU: computed or read once per (token, pair).
#pragma once

#include "common/rotation.h"
#include "common/sincos.h"
#include "common/vector.cuh"

namespace vlmkernels {

__device__ inline float load_float(const void* x, DType dtype, int64_t i) {
    if (dtype == DType::kFloat32) return static_cast<const float*>(x)[i];
    if (dtype == DType::kFloat16) return to_float(static_cast<const __half*>(x)[i]);
    return to_float(static_cast<const __nv_bfloat16*>(x)[i]);
}

__device__ inline void rotation(const Rotation& r, int token, int pair, float& cosine,
                                float& sine) {
    const int64_t b = token / r.seqlen, s = token - b * r.seqlen;
    if (r.position_ids) {
        const int64_t i = r.axis[pair] * r.position_axis_stride + b * r.position_batch_stride +
                          s * r.position_token_stride;
        const float position = r.position_dtype == DType::kInt64
                                   ? float(static_cast<const int64_t*>(r.position_ids)[i])
                                   : float(static_cast<const int32_t*>(r.position_ids)[i]);
        sin_cos(position * r.inv_freq[pair], sine, cosine);
    } else {
        const HeadStrides &c = r.cos_strides, &d = r.sin_strides;
        cosine = load_float(r.cos, r.table_dtype, b * c.batch + s * c.token + pair);
        sine = load_float(r.sin, r.table_dtype, b * d.batch + s * d.token + pair);
    }
    if (r.inverse) sine = -sine;
}

// Into shared memory, by all threads of the CTA: cos and sin [tokens, num_pairs] of the tokens from
// `first` on.
__device__ inline void load_rotations(const Rotation& r, int first, int tokens, int thread,
                                      int threads, float* cosines, float* sines) {
    for (int i = thread; i < tokens * r.num_pairs; i += threads)
        rotation(r, first + i / r.num_pairs, i % r.num_pairs, cosines[i], sines[i]);
}

}  // namespace vlmkernels
