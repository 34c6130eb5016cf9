// Launchers by element type.
#include "vq_lookup/prepare.cuh"

namespace vlmkernels {

// instances/*.cu
template <class T>
Error launch(const VqLookupParams& p, Stream stream);

int64_t vq_lookup_workspace(int num_codes, int dim) { return VqPrepared::bytes(num_codes, dim); }

Error launch_vq_lookup(const VqLookupParams& p, Stream stream) {
    if (p.num_tokens == 0) return cudaSuccess;
    if (p.dtype == DType::kFloat32) return launch<float>(p, stream);
    if (p.dtype == DType::kFloat16) return launch<__half>(p, stream);
    return launch<__nv_bfloat16>(p, stream);
}

}  // namespace vlmkernels
