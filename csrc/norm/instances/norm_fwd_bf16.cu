#include "norm/norm_fwd.cuh"

namespace vlmkernels {

template Error launch_norm_typed<__nv_bfloat16>(const NormParams& p, Stream stream);

}  // namespace vlmkernels
