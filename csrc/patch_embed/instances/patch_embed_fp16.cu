#include "patch_embed/launch.cuh"

namespace vlmkernels {

template Error launch<__half, false>(const PatchEmbedParams& p, Stream stream);
template Error launch<__half, false>(const PatchEmbedDxParams& p, Stream stream);
template Error launch<__half, false>(const PatchEmbedDweightParams& p, Stream stream);

}  // namespace vlmkernels
