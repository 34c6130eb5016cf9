#include "patch_embed/launch.cuh"

namespace vlmkernels {

template Error launch<__nv_bfloat16, false>(const PatchEmbedParams& p, Stream stream);
template Error launch<__nv_bfloat16, false>(const PatchEmbedDxParams& p, Stream stream);
template Error launch<__nv_bfloat16, false>(const PatchEmbedDweightParams& p, Stream stream);

}  // namespace vlmkernels
