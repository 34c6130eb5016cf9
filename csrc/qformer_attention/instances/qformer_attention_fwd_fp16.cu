#include "qformer_attention/qformer_attention_fwd_hopper.cuh"

namespace vlmkernels {

template Error launch<__half>(const QFormerAttentionParams& p, Stream stream);

}  // namespace vlmkernels
