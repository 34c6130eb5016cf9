#include "patch_embed/launch.cuh"

namespace vlmkernels {

template Error launch<__half, true>(const PatchEmbedParams& p, Stream stream);
template Error launch<__half, true>(const PatchEmbedDxParams& p, Stream stream);
template Error launch<__half, true>(const PatchEmbedDweightParams& p, Stream stream);

}  // namespace vlmkernels
