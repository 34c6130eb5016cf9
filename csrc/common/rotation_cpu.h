// The angles of a Rotation on the CPU: of one token at a time.
#pragma once

#include "common/cpu.h"
#include "common/rotation.h"
#include "common/sincos.h"

namespace vlmkernels {
namespace {

template <class T>
void load_row(const void* x, int64_t offset, int n, float* to) {
    for (int i = 0; i < n; ++i) to[i] = to_float(static_cast<const T*>(x)[offset + i]);
}

inline void load_tables(const Rotation& r, int64_t b, int64_t s, float* cosines, float* sines) {
    const HeadStrides &c = r.cos_strides, &d = r.sin_strides;
    dispatch_float(r.table_dtype, [&]<class T>() {
        load_row<T>(r.cos, b * c.batch + s * c.token, r.num_pairs, cosines);
        load_row<T>(r.sin, b * d.batch + s * d.token, r.num_pairs, sines);
    });
}

inline void compute_rotation(const Rotation& r, int64_t b, int64_t s, float* cosines,
                             float* sines) {
    float position[3];
    for (int axis = 0; axis < r.num_axes; ++axis) {
        const int64_t i = axis * r.position_axis_stride + b * r.position_batch_stride +
                          s * r.position_token_stride;
        position[axis] = r.position_dtype == DType::kInt64
                             ? float(static_cast<const int64_t*>(r.position_ids)[i])
                             : float(static_cast<const int32_t*>(r.position_ids)[i]);
    }
    float angle[kMaxPairs];
    for (int i = 0; i < r.num_pairs; ++i) angle[i] = position[r.axis[i]] * r.inv_freq[i];
    for (int i = 0; i < r.num_pairs; ++i) sin_cos(angle[i], sines[i], cosines[i]);
}

// cos and sin [num_pairs] of a token.
inline void load_rotation(const Rotation& r, int64_t token, float* cosines, float* sines) {
    const int64_t b = token / r.seqlen, s = token % r.seqlen;
    (r.position_ids ? compute_rotation : load_tables)(r, b, s, cosines, sines);
    if (r.inverse)
        for (int i = 0; i < r.num_pairs; ++i) sines[i] = -sines[i];
}

}  // namespace
}  // namespace vlmkernels
