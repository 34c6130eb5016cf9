// A torch tensor as the binding sees it: pointer, dtype, device, sizes, strides, and the name it
// has in error messages.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <string>

#include "binding/dlpack.h"
#include "common/dtype.h"

namespace vlmkernels {

namespace py = pybind11;

struct Tensor {
    const char* op;
    const char* name;
    void* data = nullptr;
    DType dtype = DType::kOther;
    dlpack::Device device{dlpack::kCPU, 0};
    int ndim = 0;
    const int64_t* sizes = nullptr;
    const int64_t* strides = nullptr;
    bool given = false;  // false: the argument was None

    // Views a plain torch.Tensor or Parameter; `optional` admits None.
    Tensor(const char* op, const char* name, py::handle object, bool optional = false);

    template <class T>
    T* ptr() const {
        return static_cast<T*>(data);
    }
    int64_t size(int dim) const { return sizes[dim < 0 ? dim + ndim : dim]; }
    int64_t stride(int dim) const { return strides[dim < 0 ? dim + ndim : dim]; }
    int64_t numel() const;

    // auto [tokens, heads, dim] = q.unpack<3>("(num_tokens, num_heads, head_dim)");
    template <int N>
    std::array<int64_t, N> unpack(const char* words) const {
        if (ndim != N) wrong_rank(words);
        std::array<int64_t, N> out;
        for (int i = 0; i < N; ++i) out[i] = sizes[i];
        return out;
    }

  private:
    [[noreturn]] void wrong_rank(const char* words) const;
};

std::string shape_text(const Tensor& t);
const char* dtype_text(DType dtype);
std::string device_text(const Tensor& t);

// Remembers torch.Tensor and torch.nn.Parameter, the only types the binding takes: a subclass
// inherits the exchange API but not the storage.
void register_tensor_types(py::handle tensor, py::handle parameter);
const dlpack::ExchangeApi& exchange_api();

}  // namespace vlmkernels
