#include "binding/check.h"

namespace vlmkernels {

static std::string message(const Tensor& t, const std::string& expected, const std::string& got) {
    return std::string(t.op) + ": " + t.name + " " + expected + ", got " + got;
}

void value_error(const Tensor& t, const std::string& expected, const std::string& got) {
    throw py::value_error(message(t, expected, got));
}

void type_error(const Tensor& t, const std::string& expected, const std::string& got) {
    throw py::type_error(message(t, expected, got));
}

void value_error(const char* op, const std::string& text) {
    throw py::value_error(std::string(op) + ": " + text);
}

void expect_shape(const Tensor& t, std::initializer_list<int64_t> shape, const char* words) {
    bool equal = t.ndim == int(shape.size());
    int i = 0;
    for (int64_t size : shape) equal = equal && t.sizes[i++] == size;
    if (equal) return;
    std::string text;
    for (int64_t size : shape) text += (text.empty() ? "" : ", ") + std::to_string(size);
    if (shape.size() == 1) text += ",";
    value_error(t, std::string("must have shape ") + words + " = (" + text + ")", shape_text(t));
}

void expect_same_shape(const Tensor& t, const Tensor& like) {
    bool equal = t.ndim == like.ndim;
    for (int i = 0; equal && i < t.ndim; ++i) equal = t.sizes[i] == like.sizes[i];
    if (!equal)
        value_error(t, std::string("must have the shape of ") + like.name + " " + shape_text(like),
                    shape_text(t));
}

void expect_dtype(const Tensor& t, std::initializer_list<DType> dtypes) {
    std::string text;
    for (DType dtype : dtypes) {
        if (t.dtype == dtype) return;
        const std::string name = dtype_text(dtype);
        if (text != name) text += (text.empty() ? "" : ", ") + name;  // "float32 or x's" may agree
    }
    type_error(t, "must be " + text, dtype_text(t.dtype));
}

void expect_same_dtype(const Tensor& t, const Tensor& like) {
    if (t.dtype != like.dtype)
        type_error(t,
                   std::string("must have the dtype of ") + like.name + " (" +
                       dtype_text(like.dtype) + ")",
                   dtype_text(t.dtype));
}

void expect_same_device(const Tensor& t, const Tensor& like) {
    if (t.device.type != like.device.type || t.device.id != like.device.id)
        type_error(
            t,
            std::string("must be on the device of ") + like.name + " (" + device_text(like) + ")",
            device_text(t));
}

void expect_contiguous(const Tensor& t) {
    if (t.numel() == 0) return;
    int64_t stride = 1;
    for (int i = t.ndim - 1; i >= 0; --i) {
        if (t.sizes[i] != 1 && t.strides[i] != stride)
            value_error(t, "must be contiguous", "other strides (call .contiguous())");
        stride *= t.sizes[i];
    }
}

void expect_last_dim_contiguous(const Tensor& t) {
    if (t.ndim && t.size(-1) > 1 && t.stride(-1) != 1 && t.numel())
        value_error(t, "must have a contiguous last dimension (stride 1)",
                    "stride " + std::to_string(t.stride(-1)));
}

int64_t row_stride(const Tensor& t) {
    expect_last_dim_contiguous(t);
    int64_t stride = 0, expected = 0;
    bool found = false;  // an expanded dimension has stride 0
    for (int i = t.ndim - 2; i >= 0; --i) {
        if (t.size(i) == 0) return 0;
        if (t.size(i) == 1) continue;
        if (!found) stride = expected = t.stride(i);
        found = true;
        if (t.stride(i) != expected)
            value_error(t, "must have rows at one stride", "other strides (call .contiguous())");
        expected *= t.size(i);
    }
    return stride;
}

void expect_aligned(const Tensor& t, int bytes) {
    if (t.numel() && reinterpret_cast<uintptr_t>(t.data) % bytes)
        value_error(t, "must start at a multiple of " + std::to_string(bytes) + " bytes",
                    "an offset of " + std::to_string(reinterpret_cast<uintptr_t>(t.data) % bytes) +
                        " (call .clone())");
}

}  // namespace vlmkernels
