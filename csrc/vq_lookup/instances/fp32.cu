#include "vq_lookup/launch.cuh"

namespace vlmkernels {

template Error launch<float>(const VqLookupParams& p, Stream stream);

}  // namespace vlmkernels
