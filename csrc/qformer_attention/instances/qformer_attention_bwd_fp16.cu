#include "qformer_attention/qformer_attention_bwd_hopper.cuh"

namespace vlmkernels {

template Error launch<__half>(const QFormerAttentionBackwardParams& p, Stream stream);

}  // namespace vlmkernels
