#include "patch_embed/launch.cuh"

namespace vlmkernels {

template Error launch<__nv_bfloat16>(const PatchEmbedParams& p, Stream stream);
template Error launch<__nv_bfloat16>(const PatchEmbedDxParams& p, Stream stream);
template Error launch<__nv_bfloat16>(const PatchEmbedDweightParams& p, Stream stream);

}  // namespace vlmkernels
