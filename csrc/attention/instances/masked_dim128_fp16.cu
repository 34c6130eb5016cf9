#include "attention/attention_bwd.cuh"
#include "attention/attention_fwd.cuh"

namespace vlmkernels {

template Error attention_fwd<__half, 128, MaskedScores>(const AttentionParams&, Stream);
template Error attention_bwd<__half, 128, MaskedScores>(const AttentionBackwardParams&, Stream);
template Error attention_dbias<__half, 128>(const AttentionBackwardParams&, Stream);

}  // namespace vlmkernels
