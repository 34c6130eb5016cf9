// norm: y = (h - mean) * rstd * weight + bias over the last dimension (LayerNorm), or without mean
// and bias (RMSNorm), with h = x + residual when there is a residual.
//   norm.h          what the kernels are given, and the launch declarations
//   norm_row.cuh    how a row is spread over threads, and the choice of that spread
//   norm_fwd.cuh, norm_bwd.cuh   CUDA kernels; instances/*.cu compile them for each dtype
//   norm.cu         launchers
//   norm_cpu.cpp    CPU kernels, compiled once per instruction set
//   norm.cpp        argument checks and binding
#pragma once

#include <cstdint>

#include "common/column_sums.h"
#include "common/launch.h"

namespace vlmkernels {

inline constexpr int kMaxHiddenDimCuda = 8192;  // a row is kept in the registers of one CTA

struct NormParams {
    const void* x;         // [num_rows, hidden_dim]
    const void* residual;  // the same; null: none
    const void* weight;    // [hidden_dim]
    const void* bias;      // [hidden_dim]; null: none
    void* y;               // [num_rows, hidden_dim], contiguous
    void* h;               // the same; null: no residual
    float* mean;           // [num_rows]; null: not wanted
    float* rstd;           // the same
    bool centered;         // false: RMSNorm
    int64_t num_rows;
    int hidden_dim;
    int64_t x_stride, residual_stride;  // of rows, in elements
    float eps;
    DType dtype, weight_dtype;
};

struct NormBackwardParams {
    const void* dy;           // [num_rows, hidden_dim], contiguous
    const void* dh;           // the same; null: none
    const void* h;            // [num_rows, hidden_dim]
    const void* weight;       // [hidden_dim]
    const float* mean;        // [num_rows]; null: RMSNorm
    const float* rstd;        // [num_rows]
    void* dx;                 // [num_rows, hidden_dim], contiguous
    void* dweight;            // [hidden_dim]; null: not wanted
    void* dbias;              // [hidden_dim]; null: not wanted
    float* dweight_partials;  // [num_partials, hidden_dim], summed in order: deterministic
    float* dbias_partials;    // the same
    int num_partials;
    int64_t num_rows;
    int hidden_dim;
    int64_t h_stride;
    DType dtype, weight_dtype;
};

// The second stage of the weight gradients.
inline ColumnSums column_sums_of(const NormBackwardParams& p) {
    return {.partials = {p.dweight_partials, p.dbias_partials},
            .sums = {p.dweight, p.dbias},
            .num_partials = p.num_partials,
            .num_columns = p.hidden_dim,
            .dtype = p.weight_dtype};
}

Error launch_norm(const NormParams& p, Stream stream);
Error launch_norm_backward(const NormBackwardParams& p, Stream stream);

template <class Isa>
void norm_cpu(const NormParams& p);
template <class Isa>
void norm_backward_cpu(const NormBackwardParams& p);

}  // namespace vlmkernels
