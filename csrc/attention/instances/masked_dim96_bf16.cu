#include "attention/attention_bwd.cuh"
#include "attention/attention_fwd.cuh"

namespace vlmkernels {

template Error attention_fwd<__nv_bfloat16, 96, MaskedScores>(const AttentionParams&, Stream);
template Error attention_bwd<__nv_bfloat16, 96, MaskedScores>(const AttentionBackwardParams&,
                                                              Stream);
template Error attention_dbias<__nv_bfloat16, 96>(const AttentionBackwardParams&, Stream);

}  // namespace vlmkernels
