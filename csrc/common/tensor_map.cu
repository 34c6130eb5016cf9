#include <cuda_runtime.h>

#include "common/tensor_map.h"

namespace vlmkernels {

using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                            const cuuint64_t*, const cuuint32_t*, const cuuint32_t*,
                            CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion,
                            CUtensorMapFloatOOBfill);

// From the driver that is there, so that the library loads where there is none.
static Encode find_encode() {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
    cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                                         cudaEnableDefault, &result);
    return error == cudaSuccess && result == cudaDriverEntryPointSuccess
               ? reinterpret_cast<Encode>(function)
               : nullptr;
}

static CUtensorMapDataType map_type(DType dtype) {
    switch (dtype) {
        case DType::kFloat16: return CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
        case DType::kBFloat16: return CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
        case DType::kFloat32: return CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
        case DType::kInt32: return CU_TENSOR_MAP_DATA_TYPE_INT32;
        default: return CU_TENSOR_MAP_DATA_TYPE_UINT8;
    }
}

static CUtensorMapSwizzle map_swizzle(Swizzle swizzle) {
    switch (swizzle) {
        case Swizzle::k32: return CU_TENSOR_MAP_SWIZZLE_32B;
        case Swizzle::k64: return CU_TENSOR_MAP_SWIZZLE_64B;
        case Swizzle::k128: return CU_TENSOR_MAP_SWIZZLE_128B;
        default: return CU_TENSOR_MAP_SWIZZLE_NONE;
    }
}

Error encode_tensor_map(CUtensorMap* map, const void* data, DType dtype,
                        std::initializer_list<TensorMapDim> dims, Swizzle swizzle) {
    static const Encode encode = find_encode();
    if (!encode) return cudaErrorInsufficientDriver;
    constexpr int kMaxRank = 5;
    cuuint64_t sizes[kMaxRank], strides[kMaxRank];
    cuuint32_t boxes[kMaxRank], steps[kMaxRank];
    cuuint32_t rank = 0;
    for (const TensorMapDim& dim : dims) {
        if (rank == kMaxRank || dim.size <= 0) return cudaErrorNotSupported;
        sizes[rank] = dim.size;
        boxes[rank] = dim.box;
        steps[rank] = 1;
        // Of a single element the stride is never used, but checked.
        if (rank > 0) strides[rank - 1] = dim.size == 1 ? 16 : dim.stride * size_of(dtype);
        ++rank;
    }
    const CUresult result =
        encode(map, map_type(dtype), rank, const_cast<void*>(data), sizes, strides, boxes, steps,
               CU_TENSOR_MAP_INTERLEAVE_NONE, map_swizzle(swizzle),
               CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    // Of the other codes cudaError_t has the same numbers.
    return result == CUDA_ERROR_INVALID_VALUE ? cudaErrorNotSupported : Error(result);
}

}  // namespace vlmkernels
