#include "vq_lookup/launch.cuh"

namespace vlmkernels {

template Error launch<__nv_bfloat16>(const VqLookupParams& p, Stream stream);

}  // namespace vlmkernels
