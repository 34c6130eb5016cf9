// Launches a kernel on a linear grid; nothing when the grid is empty.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <limits>

#include "common/launch.h"

namespace vlmkernels {

template <class Params>
Error launch(void (*kernel)(Params), int64_t num_blocks, int threads, int shared_bytes,
             Stream stream, const Params& params) {
    if (num_blocks == 0) return cudaSuccess;
    if (num_blocks > std::numeric_limits<int>::max()) return cudaErrorInvalidConfiguration;
    if (shared_bytes > 48 * 1024) {
        cudaError_t error =
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
        if (error != cudaSuccess) return error;
    }
    kernel<<<unsigned(num_blocks), threads, shared_bytes, stream>>>(params);
    return cudaGetLastError();
}

}  // namespace vlmkernels
