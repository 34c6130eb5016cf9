// Rotation: the angles by which the pairs of a head are rotated (elements i and i + num_pairs), the
// same for all heads of a token: position[axis[i]] * inv_freq[i], or given by their cos and sin.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace vlmkernels {

inline constexpr int kMaxPairs = 128;  // rotary_dim <= 256

struct HeadStrides {
    int64_t batch, token, head;  // in elements; head_dim has stride 1
};

struct Rotation {
    int seqlen;  // a token t is row t / seqlen, column t % seqlen
    int num_pairs;
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
    HeadStrides cos_strides, sin_strides;  // head: unused
};

}  // namespace vlmkernels
