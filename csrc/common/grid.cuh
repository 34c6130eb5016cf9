// One-dimensional grids: enough CTAs to fill the GPU, 64-bit indices, grid-stride loops.
#pragma once

#include <cstdint>

namespace vlmkernels {

__device__ inline int64_t thread_index() { return int64_t(blockIdx.x) * blockDim.x + threadIdx.x; }
__device__ inline int64_t thread_count() { return int64_t(gridDim.x) * blockDim.x; }

// CTAs for `items`, capped: grid-stride loops do the rest.
inline unsigned grid_for(int64_t items, int threads, int64_t cap = 132 * 16) {
    int64_t blocks = (items + threads - 1) / threads;
    return unsigned(blocks < 1 ? 1 : blocks < cap ? blocks : cap);
}

}  // namespace vlmkernels
