#include "patch_embed/launch_hopper.cuh"

namespace vlmkernels {

template Error launch_hopper<__half>(const PatchEmbedParams& p, Stream stream);
template Error launch_hopper<__half>(const PatchEmbedDxParams& p, Stream stream);
template Error launch_hopper<__half>(const PatchEmbedDweightParams& p, Stream stream);

}  // namespace vlmkernels
