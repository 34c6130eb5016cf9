#include "attention/attention_bwd.cuh"
#include "attention/attention_decode.cuh"
#include "attention/attention_fwd.cuh"

namespace vlmkernels {

template Error attention_fwd<__nv_bfloat16, 96, PlainScores>(const AttentionParams&, Stream);
template Error attention_bwd<__nv_bfloat16, 96, PlainScores>(const AttentionBackwardParams&,
                                                             Stream);
template Error attention_decode<__nv_bfloat16, 96>(const AttentionDecodeParams&, Stream);

}  // namespace vlmkernels
