#include "activation/activation.cuh"

namespace vlmkernels {

template Error launch_activation_typed<float>(const ActivationParams& p, Stream stream);
template Error launch_activation_backward_typed<float>(const ActivationBackwardParams& p,
                                                       Stream stream);

}  // namespace vlmkernels
