// Dispatch over dtypes; the kernels are compiled in instances/.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "activation/activation.h"

namespace vlmkernels {

template <class T>
Error launch_activation_typed(const ActivationParams& p, Stream stream);
template <class T>
Error launch_activation_backward_typed(const ActivationBackwardParams& p, Stream stream);

Error launch_activation(const ActivationParams& p, Stream stream) {
    if (p.dtype == DType::kFloat32) return launch_activation_typed<float>(p, stream);
    if (p.dtype == DType::kFloat16) return launch_activation_typed<__half>(p, stream);
    return launch_activation_typed<__nv_bfloat16>(p, stream);
}

Error launch_activation_backward(const ActivationBackwardParams& p, Stream stream) {
    if (p.dtype == DType::kFloat32) return launch_activation_backward_typed<float>(p, stream);
    if (p.dtype == DType::kFloat16) return launch_activation_backward_typed<__half>(p, stream);
    return launch_activation_backward_typed<__nv_bfloat16>(p, stream);
}

}  // namespace vlmkernels
