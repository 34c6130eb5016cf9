#include "attention/attention_bwd_sm90.cuh"

namespace vlmkernels {

template Error attention_bwd_sm90<__nv_bfloat16, 64, MaskedScores>(const AttentionBackwardParams&,
                                                                   Stream);

}  // namespace vlmkernels
