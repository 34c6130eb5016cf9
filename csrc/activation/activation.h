// activation: y = f(x), or y = f(gate) * up, with f(x) = x s(x): SiLU, QuickGELU, GELU (erf, tanh).
//   activation.h        what the kernels are given, and the launch declarations
//   gate.h              s and its derivative, for CUDA threads and CPU vectors alike
//   activation.cuh      CUDA kernels and launchers; instances/*.cu compile them for each dtype
//   activation.cu       dispatch over dtypes
//   activation_cpu.cpp  CPU kernels, compiled once per instruction set
//   activation.cpp      argument checks and binding
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/launch.h"

namespace vlmkernels {

enum class Activation { kSilu, kQuickGelu, kGelu, kGeluTanh };

struct ActivationParams {
    const void* x;   // [num_rows, dim]; the gate, where there is an `up`
    const void* up;  // the same; null: none
    void* y;         // [num_rows, dim], contiguous
    int64_t num_rows, dim;
    int64_t x_stride, up_stride;  // of rows, in elements
    DType dtype;
    Activation kind;
};

struct ActivationBackwardParams {
    const void* dy;  // [num_rows, dim], contiguous
    const void* x;   // [num_rows, dim]
    const void* up;  // the same; null: none
    void* dx;        // [num_rows, dim]
    void* dup;       // the same; null: no `up`
    int64_t num_rows, dim;
    int64_t x_stride, up_stride, dx_stride, dup_stride;
    DType dtype;
    Activation kind;
};

Error launch_activation(const ActivationParams& p, Stream stream);
Error launch_activation_backward(const ActivationBackwardParams& p, Stream stream);

template <class Isa>
void activation_cpu(const ActivationParams& p);
template <class Isa>
void activation_backward_cpu(const ActivationBackwardParams& p);

// Calls f.template operator()<kind>().
template <class F>
auto dispatch_activation(Activation kind, F&& f) {
    switch (kind) {
        case Activation::kSilu: return f.template operator()<Activation::kSilu>();
        case Activation::kQuickGelu: return f.template operator()<Activation::kQuickGelu>();
        case Activation::kGelu: return f.template operator()<Activation::kGelu>();
        default: return f.template operator()<Activation::kGeluTanh>();
    }
}

}  // namespace vlmkernels
