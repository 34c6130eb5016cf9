#include "contrastive_loss/launch.cuh"

namespace vlmkernels {

template Error launch<__nv_bfloat16>(const ContrastiveForwardParams& p, Stream stream);
template Error launch<__nv_bfloat16>(const ContrastiveBackwardParams& p, Stream stream);

}  // namespace vlmkernels
