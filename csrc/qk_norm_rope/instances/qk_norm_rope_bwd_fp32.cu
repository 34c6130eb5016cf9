#include "qk_norm_rope/qk_norm_rope_bwd.cuh"

namespace vlmkernels {

template Error launch_qk_norm_rope_backward_typed<float>(const QkNormRopeParams& p, Stream stream);

}  // namespace vlmkernels
