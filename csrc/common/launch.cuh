// Launches a kernel; nothing when the grid is empty.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <limits>
#include <type_traits>

#include "common/launch.h"

namespace vlmkernels {

// In 64 bits, so that launch() can refuse what dim3 would wrap.
struct Grid {
    int64_t x, y;
    Grid(int64_t x, int64_t y = 1) : x(x), y(y) {}
};

template <class... Params>
Error launch(void (*kernel)(Params...), Grid grid, int threads, int shared_bytes, Stream stream,
             const std::type_identity_t<Params>&... params) {
    if (grid.x == 0 || grid.y == 0) return cudaSuccess;
    if (grid.x > std::numeric_limits<int>::max() || grid.y > 65535)
        return cudaErrorInvalidConfiguration;
    if (shared_bytes > 48 * 1024) {
        cudaError_t error =
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
        if (error != cudaSuccess) return error;
    }
    kernel<<<dim3(unsigned(grid.x), unsigned(grid.y)), threads, shared_bytes, stream>>>(params...);
    return cudaGetLastError();
}

}  // namespace vlmkernels
