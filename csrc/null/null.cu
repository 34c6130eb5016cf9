// y = x, 16 bytes per thread and step; the tail byte by byte.
#include <cuda_runtime.h>

#include "common/grid.cuh"
#include "null/null.h"

namespace vlmkernels {

__global__ void __launch_bounds__(256) null_kernel(NullParams p) {
    const bool aligned =
        ((reinterpret_cast<uintptr_t>(p.x) | reinterpret_cast<uintptr_t>(p.y)) & 15) == 0;
    const int64_t vectors = aligned ? p.num_bytes / 16 : 0;
    for (int64_t i = thread_index(); i < vectors; i += thread_count())
        static_cast<uint4*>(p.y)[i] = static_cast<const uint4*>(p.x)[i];
    for (int64_t i = vectors * 16 + thread_index(); i < p.num_bytes; i += thread_count())
        static_cast<char*>(p.y)[i] = static_cast<const char*>(p.x)[i];
}

Error launch_null(const NullParams& p, Stream stream) {
    if (p.num_bytes == 0) return cudaSuccess;
    null_kernel<<<grid_for(p.num_bytes / 16 + 1, 256), 256, 0, stream>>>(p);
    return cudaGetLastError();
}

}  // namespace vlmkernels
