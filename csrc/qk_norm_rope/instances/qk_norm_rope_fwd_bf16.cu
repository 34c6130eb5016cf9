#include "qk_norm_rope/qk_norm_rope_fwd.cuh"

namespace vlmkernels {

template Error launch_qk_norm_rope_typed<__nv_bfloat16>(const QkNormRopeParams& p, Stream stream);

}  // namespace vlmkernels
