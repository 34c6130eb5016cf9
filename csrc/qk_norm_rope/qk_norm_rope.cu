// Dispatch over dtypes, and the second stage of the weight gradients.
#include "common/column_sums.cuh"
#include "qk_norm_rope/heads.cuh"

namespace vlmkernels {

Error launch_qk_norm_rope(const QkNormRopeParams& p, Stream stream) {
    if (p.num_tokens == 0) return cudaSuccess;
    if (p.dtype == DType::kFloat32) return launch_qk_norm_rope_typed<float>(p, stream);
    if (p.dtype == DType::kFloat16) return launch_qk_norm_rope_typed<__half>(p, stream);
    return launch_qk_norm_rope_typed<__nv_bfloat16>(p, stream);
}

Error launch_qk_norm_rope_backward(const QkNormRopeParams& p, const ColumnSums& weights,
                                   Stream stream) {
    const Error error =
        p.dtype == DType::kFloat32   ? launch_qk_norm_rope_backward_typed<float>(p, stream)
        : p.dtype == DType::kFloat16 ? launch_qk_norm_rope_backward_typed<__half>(p, stream)
                                     : launch_qk_norm_rope_backward_typed<__nv_bfloat16>(p, stream);
    return error != cudaSuccess ? error : launch_column_sums(weights, stream);
}

}  // namespace vlmkernels
