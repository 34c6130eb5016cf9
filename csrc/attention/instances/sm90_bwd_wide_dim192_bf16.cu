#include "attention/attention_bwd_wide_sm90.cuh"

namespace vlmkernels {

template Error attention_bwd_wide_sm90<__nv_bfloat16, 192>(const AttentionBackwardParams&, Stream);

}  // namespace vlmkernels
