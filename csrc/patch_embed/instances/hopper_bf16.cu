#include "patch_embed/launch_hopper.cuh"

namespace vlmkernels {

template Error launch_hopper<__nv_bfloat16>(const PatchEmbedParams& p, Stream stream);
template Error launch_hopper<__nv_bfloat16>(const PatchEmbedDxParams& p, Stream stream);
template Error launch_hopper<__nv_bfloat16>(const PatchEmbedDweightParams& p, Stream stream);

}  // namespace vlmkernels
