#include "vq_lookup/launch.cuh"

namespace vlmkernels {

template Error launch<__half>(const VqLookupParams& p, Stream stream);

}  // namespace vlmkernels
