#include "activation/activation.cuh"

namespace vlmkernels {

template Error launch_activation_typed<__half>(const ActivationParams& p, Stream stream);
template Error launch_activation_backward_typed<__half>(const ActivationBackwardParams& p,
                                                        Stream stream);

}  // namespace vlmkernels
