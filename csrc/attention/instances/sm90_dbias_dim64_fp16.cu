#include "attention/attention_bwd_dbias_sm90.cuh"

namespace vlmkernels {

template Error attention_dbias_sm90<__half, 64>(const AttentionBackwardParams&, Stream);

}  // namespace vlmkernels
