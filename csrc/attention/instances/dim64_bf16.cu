#include "attention/attention_fwd.cuh"

namespace vlmkernels {

template Error attention_fwd<__nv_bfloat16, 64>(const AttentionParams&, Stream);

}  // namespace vlmkernels
