#include "qformer_attention/qformer_attention_fwd_hopper.cuh"

namespace vlmkernels {

template Error launch<__nv_bfloat16>(const QFormerAttentionParams& p, Stream stream);

}  // namespace vlmkernels
