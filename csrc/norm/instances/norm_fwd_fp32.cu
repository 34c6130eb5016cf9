#include "norm/norm_fwd.cuh"

namespace vlmkernels {

template Error launch_norm_typed<float>(const NormParams& p, Stream stream);

}  // namespace vlmkernels
