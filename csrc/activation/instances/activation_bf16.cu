#include "activation/activation.cuh"

namespace vlmkernels {

template Error launch_activation_typed<__nv_bfloat16>(const ActivationParams& p, Stream stream);
template Error launch_activation_backward_typed<__nv_bfloat16>(const ActivationBackwardParams& p,
                                                               Stream stream);

}  // namespace vlmkernels
