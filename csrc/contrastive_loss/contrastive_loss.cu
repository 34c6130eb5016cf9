// Launchers by element type.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "contrastive_loss/contrastive_loss.h"

namespace vlmkernels {

// instances/*.cu
template <class T>
Error launch(const ContrastiveForwardParams& p, Stream stream);
template <class T>
Error launch(const ContrastiveBackwardParams& p, Stream stream);

template <class Params>
static Error dispatch(const Params& p, Stream stream) {
    return p.pairs.dtype == DType::kFloat16 ? launch<__half>(p, stream)
                                            : launch<__nv_bfloat16>(p, stream);
}

Error launch_contrastive_forward(const ContrastiveForwardParams& p, Stream stream) {
    return dispatch(p, stream);
}

Error launch_contrastive_backward(const ContrastiveBackwardParams& p, Stream stream) {
    return dispatch(p, stream);
}

}  // namespace vlmkernels
