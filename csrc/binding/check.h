// Argument checks: each failure names the op, the argument, what was expected and what came.
// A wrong shape or value raises ValueError, a wrong type, dtype or device TypeError.
#pragma once

#include <initializer_list>
#include <string>

#include "binding/tensor.h"

namespace vlmkernels {

[[noreturn]] void value_error(const Tensor& t, const std::string& expected, const std::string& got);
[[noreturn]] void type_error(const Tensor& t, const std::string& expected, const std::string& got);
[[noreturn]] void value_error(const char* op, const std::string& text);

// words names the sizes: expect_shape(weight, {dim}, "(hidden_dim,)").
void expect_shape(const Tensor& t, std::initializer_list<int64_t> shape, const char* words);
void expect_same_shape(const Tensor& t, const Tensor& like);
void expect_dtype(const Tensor& t, std::initializer_list<DType> dtypes);
void expect_same_dtype(const Tensor& t, const Tensor& like);
void expect_same_device(const Tensor& t, const Tensor& like);
void expect_contiguous(const Tensor& t);
void expect_last_dim_contiguous(const Tensor& t);
// Elements from one row (the last dimension) of t to the next; all leading dimensions must share
// one such stride.
int64_t row_stride(const Tensor& t);
// Kernels read 16 bytes at a time.
void expect_aligned(const Tensor& t, int bytes = 16);

inline constexpr std::initializer_list<DType> kFloats = {DType::kFloat64, DType::kFloat32,
                                                         DType::kFloat16, DType::kBFloat16};
inline constexpr std::initializer_list<DType> kInts = {DType::kInt32, DType::kInt64};

}  // namespace vlmkernels
