// Sums over groups of kWidth neighbouring threads: parts of a warp, or several warps of a CTA.
#pragma once

namespace vlmkernels {

// Replaces each of the N values by its sum over the group. scratch: N floats per warp of the CTA,
// used when a group is wider than a warp; then all threads of the CTA must take part.
template <int kWidth, int N>
__device__ inline void group_sum(float (&values)[N], float* scratch) {
    constexpr int kLanes = kWidth < 32 ? kWidth : 32;
#pragma unroll
    for (int i = 0; i < N; ++i)
#pragma unroll
        for (int offset = kLanes / 2; offset > 0; offset /= 2)
            values[i] += __shfl_xor_sync(0xffffffffu, values[i], offset);
    if constexpr (kWidth > 32) {
        constexpr int kWarps = kWidth / 32;
        const int warp = threadIdx.x / 32, first = warp / kWarps * kWarps;
        __syncthreads();  // the values of the last call have been read
        if (threadIdx.x % 32 == 0)
#pragma unroll
            for (int i = 0; i < N; ++i) scratch[warp * N + i] = values[i];
        __syncthreads();
#pragma unroll
        for (int i = 0; i < N; ++i) {
            values[i] = 0.0f;
#pragma unroll
            for (int w = 0; w < kWarps; ++w) values[i] += scratch[(first + w) * N + i];
        }
    }
}

}  // namespace vlmkernels
