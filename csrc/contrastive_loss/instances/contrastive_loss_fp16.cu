#include "contrastive_loss/launch.cuh"

namespace vlmkernels {

template Error launch<__half>(const ContrastiveForwardParams& p, Stream stream);
template Error launch<__half>(const ContrastiveBackwardParams& p, Stream stream);

}  // namespace vlmkernels
