// Backward: with xhat = (h - mean) rstd and g = dy * weight,
//   dx = rstd (g - mean(g) - xhat mean(g xhat)) + dh,  dweight = sum(dy xhat),  dbias = sum(dy)
// (RMSNorm: without mean(g)). Each CTA goes over its rows once, keeps the sums of its columns in
// registers, and writes them as its row of the partials.
#pragma once

#include "norm/norm_row.cuh"

namespace vlmkernels {

template <class T, class Spread>
__device__ void load_part(const T* from, int hidden_dim, bool valid, float (&to)[Spread::kItems]) {
#pragma unroll
    for (int i = 0; i < Spread::kItems; ++i) to[i] = 0.0f;
    if (!valid) return;
    Spread::for_each_vector(hidden_dim, [&](int column, int i) {
        float a[Spread::V];
        load(from + column, a);
#pragma unroll
        for (int j = 0; j < Spread::V; ++j) to[i + j] = a[j];
    });
}

// Writes the sums over the row groups of this CTA to `out` (hidden_dim), adding them in order.
template <class Spread>
__device__ void write_partial(const float (&sums)[Spread::kItems], int hidden_dim, float* columns,
                              float* out) {
    for (int group = 0; group < Spread::kRows; ++group) {
        if (group == Spread::group())
            Spread::for_each_vector(hidden_dim, [&](int column, int i) {
#pragma unroll
                for (int j = 0; j < Spread::V; ++j) {
                    const float before = group == 0 ? 0.0f : columns[column + j];
                    (Spread::kRows > 1 ? columns : out)[column + j] = before + sums[i + j];
                }
            });
        __syncthreads();
    }
    if constexpr (Spread::kRows > 1) {
        for (int i = threadIdx.x; i < hidden_dim; i += Spread::kThreads) out[i] = columns[i];
        __syncthreads();
    }
}

template <class T, class Spread, bool kCentered>
__global__ void __launch_bounds__(Spread::kThreads)
    norm_backward_kernel(const __grid_constant__ NormBackwardParams p) {
    constexpr int V = Spread::V, kItems = Spread::kItems;
    __shared__ float scratch[2 * Spread::kThreads / 32];
    __shared__ float columns[Spread::kRows > 1 ? Spread::kCapacity : 1];
    const bool float_weight = p.weight_dtype == DType::kFloat32;
    float dweight[kItems] = {}, dbias[kCentered ? kItems : 1] = {};
    for (int64_t first = int64_t(blockIdx.x) * Spread::kRows; first < p.num_rows;
         first += int64_t(gridDim.x) * Spread::kRows) {
        const int64_t row = first + Spread::group(), offset = row * p.hidden_dim;
        const bool valid = row < p.num_rows;
        const float mean = kCentered && valid ? p.mean[row] : 0.0f;
        const float rstd = valid ? p.rstd[row] : 0.0f;
        float xhat[kItems], g[kItems], sums[2] = {0.0f, 0.0f};  // of g xhat and g
        load_part<T, Spread>(static_cast<const T*>(p.h) + row * p.h_stride, p.hidden_dim, valid,
                             xhat);
        load_part<T, Spread>(static_cast<const T*>(p.dy) + offset, p.hidden_dim, valid, g);
        Spread::for_each_vector(p.hidden_dim, [&](int column, int i) {
            float w[V];
            load_weight<V, T>(p.weight, float_weight, column, w);
#pragma unroll
            for (int j = 0; j < V; ++j) {
                xhat[i + j] = (xhat[i + j] - mean) * rstd;
                dweight[i + j] += g[i + j] * xhat[i + j];
                if constexpr (kCentered) dbias[i + j] += g[i + j];
                g[i + j] *= w[j];
                sums[0] += g[i + j] * xhat[i + j];
                sums[1] += g[i + j];
            }
        });
        group_sum<Spread::kWidth>(sums, scratch);
        const float along = sums[0] / p.hidden_dim;
        const float common = kCentered ? sums[1] / p.hidden_dim : 0.0f;
        if (!valid) continue;
        Spread::for_each_vector(p.hidden_dim, [&](int column, int i) {
            float dx[V] = {};
            if (p.dh) load(static_cast<const T*>(p.dh) + offset + column, dx);
#pragma unroll
            for (int j = 0; j < V; ++j) dx[j] += rstd * (g[i + j] - common - xhat[i + j] * along);
            store(static_cast<T*>(p.dx) + offset + column, dx);
        });
    }
    const int64_t partial = int64_t(blockIdx.x) * p.hidden_dim;
    if (p.dweight)
        write_partial<Spread>(dweight, p.hidden_dim, columns, p.dweight_partials + partial);
    if constexpr (kCentered)
        if (p.dbias)
            write_partial<Spread>(dbias, p.hidden_dim, columns, p.dbias_partials + partial);
}

template <class T, int V>
Error launch_norm_backward_vectors(const NormBackwardParams& p, Stream stream) {
    return dispatch_spread<V, 16>(p.hidden_dim, [&]<class Spread>(Spread) {
        if (p.mean)
            norm_backward_kernel<T, Spread, true>
                <<<p.num_partials, Spread::kThreads, 0, stream>>>(p);
        else
            norm_backward_kernel<T, Spread, false>
                <<<p.num_partials, Spread::kThreads, 0, stream>>>(p);
        return Error(cudaGetLastError());
    });
}

template <class T>
Error launch_norm_backward_typed(const NormBackwardParams& p, Stream stream) {
    constexpr int V = 16 / sizeof(T);
    const bool aligned = p.hidden_dim % V == 0 && p.h_stride % V == 0 && divides(16, p.dy) &&
                         divides(16, p.dh) && divides(16, p.h) && divides(16, p.weight) &&
                         divides(16, p.dx);
    return aligned ? launch_norm_backward_vectors<T, V>(p, stream)
                   : launch_norm_backward_vectors<T, 1>(p, stream);
}

}  // namespace vlmkernels
