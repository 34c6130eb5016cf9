// Forward: each row is read once, kept in registers for the statistics, and written once.
#pragma once

#include "common/grid.cuh"
#include "norm/norm_row.cuh"

namespace vlmkernels {

// Element i of the thread's part of the row is h, in fp32; 0 beyond the row.
template <class T, class Spread>
__device__ void load_row(const NormParams& p, int64_t row, float (&z)[Spread::kItems]) {
    constexpr int V = Spread::V;
    const bool valid = row < p.num_rows;
    RowPart<T, Spread> x, residual;
    x.load(static_cast<const T*>(p.x) + row * p.x_stride, p.hidden_dim, valid);
    if (p.residual)
        residual.load(static_cast<const T*>(p.residual) + row * p.residual_stride, p.hidden_dim,
                      valid);
#pragma unroll
    for (int v = 0; v < Spread::kVectors; ++v) {
        float a[V];
        x.get(v, a);
#pragma unroll
        for (int j = 0; j < V; ++j) z[v * V + j] = a[j];
    }
    if (!p.residual || !valid) return;
    T* h = static_cast<T*>(p.h) + row * p.hidden_dim;
    Spread::for_each_vector(p.hidden_dim, [&](int column, int v) {
        float b[V];
        residual.get(v, b);
#pragma unroll
        for (int j = 0; j < V; ++j)
            b[j] = z[v * V + j] = to_float(from_float<T>(z[v * V + j] + b[j]));
        store(h + column, b);
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
        Spread::for_each_vector(p.hidden_dim, [&](int, int v) {
#pragma unroll
            for (int j = 0; j < V; ++j) {
                z[v * V + j] -= mean;
                sum[0] += z[v * V + j] * z[v * V + j];
            }
        });
        group_sum<Spread::kWidth>(sum, scratch);
        const float rstd = rsqrtf(sum[0] / p.hidden_dim + p.eps);
        if (row >= p.num_rows) continue;
        if (Spread::lane() == 0 && p.rstd) {
            p.rstd[row] = rstd;
            if constexpr (kCentered) p.mean[row] = mean;
        }
        T* y = static_cast<T*>(p.y) + row * p.hidden_dim;
        Spread::for_each_vector(p.hidden_dim, [&](int column, int v) {
            float w[V], b[V] = {};
            load_weight<V, T>(p.weight, float_weight, column, w);
            if (p.bias) load_weight<V, T>(p.bias, float_weight, column, b);
#pragma unroll
            for (int j = 0; j < V; ++j) w[j] = z[v * V + j] * rstd * w[j] + b[j];
            store(y + column, w);
        });
    }
}

template <class T, int V>
Error launch_norm_vectors(const NormParams& p, Stream stream) {
    auto launch = [&]<class Spread>(Spread) {
        const unsigned grid = grid_for(p.num_rows, Spread::kRows);
        if (p.centered)
            norm_kernel<T, Spread, true><<<grid, Spread::kThreads, 0, stream>>>(p);
        else
            norm_kernel<T, Spread, false><<<grid, Spread::kThreads, 0, stream>>>(p);
        return Error(cudaGetLastError());
    };
    if constexpr (V == 1)  // serves every alignment
        return launch(RowSpread<1, 256, kMaxHiddenDimCuda / 256>());
    else
        return narrowest_spread<RowSpread<V, 16, 8>, RowSpread<V, 32, 8>, RowSpread<V, 32, 16>,
                                RowSpread<V, 32, 24>, RowSpread<V, 64, 16>, RowSpread<V, 64, 24>,
                                RowSpread<V, 128, 16>, RowSpread<V, 128, 24>, RowSpread<V, 256, 16>,
                                RowSpread<V, 256, 24>, RowSpread<V, 256, 32>>(p.hidden_dim, launch);
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
