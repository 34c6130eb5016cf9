// Launchers by element type. Without queries there are no kernels: dx is zero.
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
    return p.dtype == DType::kFloat16 ? launch<__half>(p, stream)
                                      : launch<__nv_bfloat16>(p, stream);
}

Error launch_qformer_attention(const QFormerAttentionParams& p, Stream stream) {
    return p.num_queries ? dispatch(p, stream) : cudaSuccess;
}

Error launch_qformer_attention_backward(const QFormerAttentionBackwardParams& p, Stream stream) {
    if (p.num_queries) return dispatch(p, stream);
    const int64_t elements = int64_t(p.batch) * p.num_tokens * p.width;
    return p.dx ? cudaMemsetAsync(p.dx, 0, elements * size_of(p.dtype), stream) : cudaSuccess;
}

}  // namespace vlmkernels
