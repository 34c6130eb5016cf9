// Backward: with xhat = (h - mean) rstd and g = dy * weight,
//   dx = rstd (g - mean(g) - xhat mean(g xhat)) + dh,  dweight = sum(dy xhat),  dbias = sum(dy)
// (RMSNorm: without mean(g)). Each CTA goes over its rows once, keeps the sums of its columns in
// registers, and writes them as its row of the partials. Where registers allow, the next row is on
// its way while this one is worked on.
#pragma once

#include "norm/norm_row.cuh"

namespace vlmkernels {

template <class T, class Spread>
struct BackwardRow {
    int64_t index;
    bool valid;
    RowPart<T, Spread> h, dy;
    float mean, rstd;

    __device__ void load(const NormBackwardParams& p, int64_t first) {
        index = first + Spread::group();
        valid = index < p.num_rows;
        h.load(static_cast<const T*>(p.h) + index * p.h_stride, p.hidden_dim, valid);
        dy.load(static_cast<const T*>(p.dy) + index * p.hidden_dim, p.hidden_dim, valid);
        mean = valid && p.mean ? p.mean[index] : 0.0f;
        rstd = valid ? p.rstd[index] : 0.0f;
    }
};

// Writes the sums over the row groups of this CTA to `out` (hidden_dim), adding them in order.
template <class Spread>
__device__ void write_partial(const float (&sums)[Spread::kItems], int hidden_dim, float* columns,
                              float* out) {
    constexpr int V = Spread::V;
    float* mine = Spread::kRows > 1 ? columns + Spread::group() * Spread::kCapacity : out;
    Spread::for_each_vector(hidden_dim, [&](int column, int v) {
        float part[V];
#pragma unroll
        for (int j = 0; j < V; ++j) part[j] = sums[v * V + j];
        store(mine + column, part);
    });
    if constexpr (Spread::kRows > 1) {
        __syncthreads();
        for (int i = threadIdx.x; i < hidden_dim; i += Spread::kThreads) {
            float sum = 0.0f;
#pragma unroll
            for (int group = 0; group < Spread::kRows; ++group)
                sum += columns[group * Spread::kCapacity + i];
            out[i] = sum;
        }
        __syncthreads();
    }
}

template <class T, class Spread, bool kCentered>
__global__ void __launch_bounds__(Spread::kThreads)
    norm_backward_kernel(const __grid_constant__ NormBackwardParams p) {
    constexpr int V = Spread::V, kItems = Spread::kItems;
    __shared__ float scratch[2 * Spread::kThreads / 32];
    __shared__ __align__(
        16) float columns[Spread::kRows > 1 ? Spread::kRows * Spread::kCapacity : 1];
    const bool float_weight = p.weight_dtype == DType::kFloat32;
    const int64_t stride = int64_t(gridDim.x) * Spread::kRows;
    float dweight[kItems] = {}, dbias[kCentered ? kItems : 1] = {};
    int64_t first = int64_t(blockIdx.x) * Spread::kRows;
    constexpr bool kAhead = sizeof(T) == 2 && V > 1;
    BackwardRow<T, Spread> row;
    if (kAhead) row.load(p, first);
    while (first < p.num_rows) {
        if (!kAhead) row.load(p, first);
        const BackwardRow<T, Spread> now = row;
        first += stride;
        if (kAhead && first < p.num_rows) row.load(p, first);
        float sums[2] = {0.0f, 0.0f};  // of g xhat and g
        Spread::for_each_vector(p.hidden_dim, [&](int column, int v) {
            float w[V], x[V], dy[V];
            load_weight<V, T>(p.weight, float_weight, column, w);
            now.h.get(v, x);
            now.dy.get(v, dy);
#pragma unroll
            for (int j = 0; j < V; ++j) {
                const float xhat = (x[j] - now.mean) * now.rstd, g = dy[j] * w[j];
                dweight[v * V + j] += dy[j] * xhat;
                if constexpr (kCentered) dbias[v * V + j] += dy[j];
                sums[0] += g * xhat;
                sums[1] += g;
            }
        });
        group_sum<Spread::kWidth>(sums, scratch);
        const float along = sums[0] / p.hidden_dim;
        const float common = kCentered ? sums[1] / p.hidden_dim : 0.0f;
        if (!now.valid) continue;
        const int64_t offset = now.index * p.hidden_dim;
        RowPart<T, Spread> dh;
        if (p.dh) dh.load(static_cast<const T*>(p.dh) + offset, p.hidden_dim, true);
        Spread::for_each_vector(p.hidden_dim, [&](int column, int v) {
            float w[V], x[V], dy[V], dx[V] = {};
            load_weight<V, T>(p.weight, float_weight, column, w);
            now.h.get(v, x);
            now.dy.get(v, dy);
            if (p.dh) dh.get(v, dx);
#pragma unroll
            for (int j = 0; j < V; ++j) {
                const float xhat = (x[j] - now.mean) * now.rstd;
                dx[j] += now.rstd * (dy[j] * w[j] - common - xhat * along);
            }
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
    auto launch = [&]<class Spread>(Spread) {
        if (p.mean)
            norm_backward_kernel<T, Spread, true>
                <<<p.num_partials, Spread::kThreads, 0, stream>>>(p);
        else
            norm_backward_kernel<T, Spread, false>
                <<<p.num_partials, Spread::kThreads, 0, stream>>>(p);
        return Error(cudaGetLastError());
    };
    if constexpr (V == 1)  // serves every alignment
        return launch(RowSpread<1, 512, kMaxHiddenDimCuda / 512>());
    else
        return narrowest_spread<RowSpread<V, 16, 8>, RowSpread<V, 32, 8>, RowSpread<V, 32, 16>,
                                RowSpread<V, 32, 24>, RowSpread<V, 64, 16>, RowSpread<V, 64, 24>,
                                RowSpread<V, 128, 16>, RowSpread<V, 128, 24>, RowSpread<V, 256, 16>,
                                RowSpread<V, 256, 24>, RowSpread<V, 512, 16>>(p.hidden_dim, launch);
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
