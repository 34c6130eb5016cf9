// Launchers by element type. Without patches there are no kernels: dweight and dbias are zero.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "patch_embed/patch_embed.h"

namespace vlmkernels {

// instances/*.cu
template <class T, bool kPixels>
Error launch(const PatchEmbedParams& p, Stream stream);
template <class T, bool kPixels>
Error launch(const PatchEmbedDxParams& p, Stream stream);
template <class T, bool kPixels>
Error launch(const PatchEmbedDweightParams& p, Stream stream);

template <class Params>
static Error dispatch(const Params& p, Stream stream) {
    const bool half = p.dtype == DType::kFloat16;
    if (p.patches.pixels())
        return half ? launch<__half, true>(p, stream) : launch<__nv_bfloat16, true>(p, stream);
    return half ? launch<__half, false>(p, stream) : launch<__nv_bfloat16, false>(p, stream);
}

Error launch_patch_embed(const PatchEmbedParams& p, Stream stream) {
    return p.patches.num_patches ? dispatch(p, stream) : cudaSuccess;
}

Error launch_patch_embed_dx(const PatchEmbedDxParams& p, Stream stream) {
    return p.patches.num_patches ? dispatch(p, stream) : cudaSuccess;
}

Error launch_patch_embed_dweight(const PatchEmbedDweightParams& p, Stream stream) {
    if (p.patches.num_patches) return dispatch(p, stream);
    if (!p.dweight) {
        const int64_t width = p.patches.patch_dim + p.sums;
        return cudaMemsetAsync(p.workspace, 0, p.hidden_dim * width * sizeof(float), stream);
    }
    const int64_t bytes = p.hidden_dim * int64_t(sizeof(__half));  // as many as bf16
    Error error = cudaMemsetAsync(p.dweight, 0, bytes * p.patches.patch_dim, stream);
    if (error || !p.dbias) return error;
    return cudaMemsetAsync(p.dbias, 0, bytes, stream);
}

}  // namespace vlmkernels
