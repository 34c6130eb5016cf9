#include "norm/norm_fwd.cuh"

namespace vlmkernels {

template Error launch_norm_typed<__half>(const NormParams& p, Stream stream);

}  // namespace vlmkernels
