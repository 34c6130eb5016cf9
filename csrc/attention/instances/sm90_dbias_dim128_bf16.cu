#include "attention/attention_bwd_dbias_sm90.cuh"

namespace vlmkernels {

template Error attention_dbias_sm90<__nv_bfloat16, 128>(const AttentionBackwardParams&, Stream);

}  // namespace vlmkernels
