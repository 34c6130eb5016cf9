#include "attention/attention_bwd.cuh"
#include "attention/attention_fwd.cuh"

namespace vlmkernels {

template Error attention_fwd<__half, 64, MaskedScores>(const AttentionParams&, Stream);
template Error attention_bwd<__half, 64, MaskedScores>(const AttentionBackwardParams&, Stream);
template Error attention_dbias<__half, 64>(const AttentionBackwardParams&, Stream);

}  // namespace vlmkernels
