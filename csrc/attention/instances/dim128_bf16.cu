#include "attention/attention_fwd.cuh"

namespace vlmkernels {

template Error attention_fwd<__nv_bfloat16, 128>(const AttentionParams&, Stream);

}  // namespace vlmkernels
