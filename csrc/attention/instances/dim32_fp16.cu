#include "attention/attention_fwd.cuh"

namespace vlmkernels {

template Error attention_fwd<__half, 32>(const AttentionParams&, Stream);

}  // namespace vlmkernels
