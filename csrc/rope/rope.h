// rope: rotates pair i of each head, the elements i and i + rotary_dim/2, by an angle that all
// heads of a token share: position[axis[i]] * inv_freq[i], or one whose cos and sin are given.
//   rope.h        what the kernel is given, and the launch declarations
//   rope.cu       CUDA kernel and launcher
//   rope_cpu.cpp  CPU kernel, compiled once per instruction set
//   rope.cpp      argument checks and binding
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/launch.h"

namespace vlmkernels {

inline constexpr int kMaxPairs = 128;  // rotary_dim <= 256

struct RopeStrides {
    int64_t batch, token, head;  // in elements; head_dim has stride 1
};

struct RopeHeads {
    const void* in;  // [batch, seqlen, num_heads, head_dim]
    void* out;       // the same; may be `in`
    int num_heads;
    RopeStrides in_strides, out_strides;
};

struct RopeParams {
    RopeHeads q, k;
    DType dtype;
    int num_tokens, seqlen;  // num_tokens = batch * seqlen
    int head_dim, num_pairs;
    bool inverse;

    const void* position_ids;  // [num_axes, batch, seqlen]; null: cos and sin are given
    int num_axes;              // 1..3
    DType position_dtype;      // int32 or int64
    int64_t position_axis_stride, position_batch_stride, position_token_stride;
    float inv_freq[kMaxPairs];  // [num_pairs]
    uint8_t axis[kMaxPairs];    // [num_pairs]

    const void* cos;  // [batch, seqlen, num_pairs or more]
    const void* sin;  // the same
    DType table_dtype;
    RopeStrides cos_strides, sin_strides;  // head: unused
};

Error launch_rope(const RopeParams& p, Stream stream);

template <class Isa>
void rope_cpu(const RopeParams& p);

}  // namespace vlmkernels
