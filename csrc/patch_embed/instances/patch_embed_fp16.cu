#include "patch_embed/launch.cuh"

namespace vlmkernels {

template Error launch<__half>(const PatchEmbedParams& p, Stream stream);
template Error launch<__half>(const PatchEmbedDxParams& p, Stream stream);
template Error launch<__half>(const PatchEmbedDweightParams& p, Stream stream);

}  // namespace vlmkernels
