// Tensor maps: what a kernel gives to TMA. A kernel takes one as `const __grid_constant__
// CUtensorMap map` and passes &map to tma_load() and its like (hopper.cuh).
#pragma once

#include <cuda.h>  // types only

#include <cstdint>
#include <initializer_list>

#include "common/dtype.h"
#include "common/launch.h"

namespace vlmkernels {

// Bytes of the span of shared memory within which 16-byte chunks are permuted; the innermost box is
// at most as wide.
enum class Swizzle { kNone = 0, k32 = 32, k64 = 64, k128 = 128 };

struct TensorMapDim {
    int64_t size;  // > 0
    int64_t
        stride;  // in elements; the innermost is 1, of the others the bytes are a multiple of 16
    int box;     // elements that one copy takes, up to 256
};

// dims: innermost first, up to 5. What lies outside reads as zero and is not written. data: 16-byte
// aligned. Fails with cudaErrorNotSupported where the hardware could not do it.
Error encode_tensor_map(CUtensorMap* map, const void* data, DType dtype,
                        std::initializer_list<TensorMapDim> dims, Swizzle swizzle);

}  // namespace vlmkernels
