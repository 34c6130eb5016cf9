// Element types of tensors, for host and device code alike.
#pragma once

#include <cstdint>

namespace vlmkernels {

enum class DType { kFloat64, kFloat32, kFloat16, kBFloat16, kInt64, kInt32, kUInt8, kBool, kOther };

constexpr int size_of(DType dtype) {
    switch (dtype) {
        case DType::kFloat64:
        case DType::kInt64: return 8;
        case DType::kFloat32:
        case DType::kInt32: return 4;
        case DType::kFloat16:
        case DType::kBFloat16: return 2;
        default: return 1;
    }
}

}  // namespace vlmkernels
