#include "attention/attention_bwd.cuh"
#include "attention/attention_decode.cuh"
#include "attention/attention_fwd.cuh"

namespace vlmkernels {

template Error attention_fwd<__half, 64, PlainScores>(const AttentionParams&, Stream);
template Error attention_bwd<__half, 64, PlainScores>(const AttentionBackwardParams&, Stream);
template Error attention_decode<__half, 64>(const AttentionDecodeParams&, Stream);

}  // namespace vlmkernels
