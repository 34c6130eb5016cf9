#include "patch_embed/launch.cuh"

namespace vlmkernels {

template Error launch<__nv_bfloat16, true>(const PatchEmbedParams& p, Stream stream);
template Error launch<__nv_bfloat16, true>(const PatchEmbedDxParams& p, Stream stream);
template Error launch<__nv_bfloat16, true>(const PatchEmbedDweightParams& p, Stream stream);

}  // namespace vlmkernels
