#include "qformer_attention/qformer_attention_bwd_hopper.cuh"

namespace vlmkernels {

template Error launch<__nv_bfloat16>(const QFormerAttentionBackwardParams& p, Stream stream);

}  // namespace vlmkernels
