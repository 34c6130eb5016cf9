// qk_norm_rope: RMSNorm over each head of q and k, with one weight for all heads of q and one for
// all heads of k, then the rotation of common/rotation.h: y = R (x rstd weight), in one pass.
//   qk_norm_rope.h       what the kernels are given, and the launch declarations
//   heads.cuh            how a head is spread over threads, and the choice of that spread
//   qk_norm_rope_fwd.cuh, qk_norm_rope_bwd.cuh   CUDA kernels; instances/*.cu compile them
//   qk_norm_rope.cu      dispatch over dtypes, and the second stage of the weight gradients
//   qk_norm_rope_cpu.cpp CPU kernels, compiled once per instruction set
//   qk_norm_rope.cpp     argument checks and binding
#pragma once

#include "common/column_sums.h"
#include "common/fast_divide.h"
#include "common/launch.h"
#include "common/rotation.h"

namespace vlmkernels {

inline constexpr int kMaxNormedHeadDim = 256;

struct NormedHeads {
    const void* x;       // [batch, seqlen, num_heads, head_dim]
    const void* dy;      // the same; null: forward
    void* out;           // y, or dx: the same
    const void* weight;  // [head_dim]
    int num_heads;
    HeadStrides x_strides, dy_strides, out_strides;
    FastDivide by_heads;  // divides by num_heads
};

struct QkNormRopeParams {
    NormedHeads q, k;
    DType dtype, weight_dtype;
    int num_tokens;  // batch * seqlen
    int head_dim;
    float eps;
    Rotation rotation;
    float* partials[2];  // [num_partials, head_dim] of q's and k's weight gradient; null: forward,
    int num_partials;    // or not wanted
};

Error launch_qk_norm_rope(const QkNormRopeParams& p, Stream stream);
Error launch_qk_norm_rope_backward(const QkNormRopeParams& p, const ColumnSums& weights,
                                   Stream stream);

template <class Isa>
void qk_norm_rope_cpu(const QkNormRopeParams& p);
template <class Isa>
void qk_norm_rope_backward_cpu(const QkNormRopeParams& p, const ColumnSums& weights);

}  // namespace vlmkernels
