#include "attention/attention_fwd_masked_sm90.cuh"

namespace vlmkernels {

template Error attention_fwd_masked_sm90<__half, 96>(AttentionParams, int, Stream);

}  // namespace vlmkernels
