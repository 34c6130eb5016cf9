// Forward: each row is read once, kept in registers for the statistics, and written once.
#pragma once

#include "common/grid.cuh"
#include "norm/norm_row.cuh"

namespace vlmkernels {

// Element i of the thread's part of the row is h, in fp32; 0 beyond the row.
template <class T, class Spread>
__device__ void load_row(const NormParams& p, int64_t row, float (&z)[Spread::kItems]) {
    constexpr int V = Spread::V;
#pragma unroll
    for (int i = 0; i < Spread::kItems; ++i) z[i] = 0.0f;
    if (row >= p.num_rows) return;
    const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
    const T* residual = static_cast<const T*>(p.residual) + row * p.residual_stride;
    T* h = static_cast<T*>(p.h) + row * p.hidden_dim;
    Spread::for_each_vector(p.hidden_dim, [&](int column, int i) {
        float a[V];
        load(x + column, a);
        if (p.residual) {
            float b[V];
            load(residual + column, b);
#pragma unroll
            for (int j = 0; j < V; ++j) a[j] = to_float(from_float<T>(a[j] + b[j]));
            store(h + column, a);
        }
#pragma unroll
        for (int j = 0; j < V; ++j) z[i + j] = a[j];
    });
}

template <class T, class Spread, bool kCentered>
__global__ void __launch_bounds__(Spread::kThreads)
    norm_kernel(const __grid_constant__ NormParams p) {
    constexpr int V = Spread::V;
    __shared__ float scratch[Spread::kThreads / 32];
    const bool float_weight = p.weight_dtype == DType::kFloat32;
    for (int64_t first = int64_t(blockIdx.x) * Spread::kRows; first < p.num_rows;
         first += int64_t(gridDim.x) * Spread::kRows) {
        const int64_t row = first + Spread::group();
        float z[Spread::kItems], sum[1] = {0.0f}, mean = 0.0f;
        load_row<T, Spread>(p, row, z);
        if constexpr (kCentered) {
#pragma unroll
            for (int i = 0; i < Spread::kItems; ++i) sum[0] += z[i];
            group_sum<Spread::kWidth>(sum, scratch);
            mean = sum[0] / p.hidden_dim;
            sum[0] = 0.0f;
        }
        Spread::for_each_vector(p.hidden_dim, [&](int, int i) {
#pragma unroll
            for (int j = 0; j < V; ++j) {
                z[i + j] -= mean;
                sum[0] += z[i + j] * z[i + j];
            }
        });
        group_sum<Spread::kWidth>(sum, scratch);
        const float rstd = rsqrtf(sum[0] / p.hidden_dim + p.eps);
        if (row >= p.num_rows) continue;
        if (Spread::lane() == 0) {
            p.rstd[row] = rstd;
            if constexpr (kCentered) p.mean[row] = mean;
        }
        T* y = static_cast<T*>(p.y) + row * p.hidden_dim;
        Spread::for_each_vector(p.hidden_dim, [&](int column, int i) {
            float w[V], b[V] = {};
            load_weight<V, T>(p.weight, float_weight, column, w);
            if (p.bias) load_weight<V, T>(p.bias, float_weight, column, b);
#pragma unroll
            for (int j = 0; j < V; ++j) w[j] = z[i + j] * rstd * w[j] + b[j];
            store(y + column, w);
        });
    }
}

template <class T, int V>
Error launch_norm_vectors(const NormParams& p, Stream stream) {
    return dispatch_spread<V, 32>(p.hidden_dim, [&]<class Spread>(Spread) {
        const unsigned grid = grid_for(p.num_rows, Spread::kRows);
        if (p.mean)
            norm_kernel<T, Spread, true><<<grid, Spread::kThreads, 0, stream>>>(p);
        else
            norm_kernel<T, Spread, false><<<grid, Spread::kThreads, 0, stream>>>(p);
        return Error(cudaGetLastError());
    });
}

template <class T>
Error launch_norm_typed(const NormParams& p, Stream stream) {
    constexpr int V = 16 / sizeof(T);
    const bool aligned = p.hidden_dim % V == 0 && p.x_stride % V == 0 &&
                         p.residual_stride % V == 0 && divides(16, p.x) &&
                         divides(16, p.residual) && divides(16, p.weight) && divides(16, p.bias) &&
                         divides(16, p.y) && divides(16, p.h);
    return aligned ? launch_norm_vectors<T, V>(p, stream) : launch_norm_vectors<T, 1>(p, stream);
}

}  // namespace vlmkernels
