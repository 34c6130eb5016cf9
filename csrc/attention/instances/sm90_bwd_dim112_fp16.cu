#include "attention/attention_bwd_sm90.cuh"

namespace vlmkernels {

template Error attention_bwd_sm90<__half, 112, PlainScores>(const AttentionBackwardParams&, Stream);

}  // namespace vlmkernels
