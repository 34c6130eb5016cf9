// A warp reads 32 columns of one partial at a time; blockIdx.y says which matrix.
#pragma once

#include <cuda_runtime.h>

#include "common/column_sums.h"
#include "common/launch.h"
#include "common/vector.cuh"

namespace vlmkernels {

inline constexpr int kSumColumns = 32, kSumSlices = 32, kSumLoads = 9;

static __global__ void __launch_bounds__(kSumColumns* kSumSlices)
    column_sums_kernel(const __grid_constant__ ColumnSums p) {
    __shared__ float slices[kSumSlices][kSumColumns];
    const float* partials = p.partials[blockIdx.y];
    void* out = p.sums[blockIdx.y];
    if (!out) return;
    const int column = blockIdx.x * kSumColumns + threadIdx.x;
    float sum = 0.0f;
    for (int first = threadIdx.y; first < p.num_partials; first += kSumSlices * kSumLoads) {
        float x[kSumLoads];  // in flight together
#pragma unroll
        for (int j = 0; j < kSumLoads; ++j) {
            const int i = first + j * kSumSlices;
            const bool there = i < p.num_partials && column < p.num_columns;
            x[j] = there ? partials[int64_t(i) * p.num_columns + column] : 0.0f;
        }
#pragma unroll
        for (int j = 0; j < kSumLoads; ++j) sum += x[j];
    }
    slices[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y || column >= p.num_columns) return;
    for (int i = 1; i < kSumSlices; ++i) sum += slices[i][threadIdx.x];
    if (p.dtype == DType::kFloat32)
        static_cast<float*>(out)[column] = sum;
    else if (p.dtype == DType::kFloat16)
        static_cast<__half*>(out)[column] = from_float<__half>(sum);
    else
        static_cast<__nv_bfloat16*>(out)[column] = from_float<__nv_bfloat16>(sum);
}

inline Error launch_column_sums(const ColumnSums& p, Stream stream) {
    if (!p.sums[0] && !p.sums[1]) return cudaSuccess;
    const dim3 grid((p.num_columns + kSumColumns - 1) / kSumColumns, p.sums[1] ? 2 : 1);
    column_sums_kernel<<<grid, dim3(kSumColumns, kSumSlices), 0, stream>>>(p);
    return cudaGetLastError();
}

}  // namespace vlmkernels
