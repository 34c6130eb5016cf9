#include "norm/norm_bwd.cuh"

namespace vlmkernels {

template Error launch_norm_backward_typed<__nv_bfloat16>(const NormBackwardParams& p,
                                                         Stream stream);

}  // namespace vlmkernels
