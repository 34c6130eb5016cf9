#include "attention/attention_bwd_sm90.cuh"

namespace vlmkernels {

template Error attention_bwd_sm90<__nv_bfloat16, 80, PlainScores>(const AttentionBackwardParams&,
                                                                  Stream);

}  // namespace vlmkernels
