#include "attention/attention_fwd_sm90.cuh"

namespace vlmkernels {

template Error attention_fwd_sm90<__half, 112>(const AttentionParams&, Stream);

}  // namespace vlmkernels
