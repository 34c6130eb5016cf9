// Launchers by element type. Without queries or images there is nothing to do; without tokens or
// width the kernels write zeros.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "qformer_attention/qformer_attention.h"

namespace vlmkernels {

// instances/*.cu
template <class T>
Error launch(const QFormerAttentionParams& p, Stream stream);
template <class T>
Error launch(const QFormerAttentionBackwardParams& p, Stream stream);

template <class Params>
static Error dispatch(const Params& p, Stream stream) {
    if (p.batch == 0 || p.num_queries == 0) return cudaSuccess;
    return p.dtype == DType::kFloat16 ? launch<__half>(p, stream)
                                      : launch<__nv_bfloat16>(p, stream);
}

Error launch_qformer_attention(const QFormerAttentionParams& p, Stream stream) {
    return dispatch(p, stream);
}

Error launch_qformer_attention_backward(const QFormerAttentionBackwardParams& p, Stream stream) {
    return dispatch(p, stream);
}

}  // namespace vlmkernels
