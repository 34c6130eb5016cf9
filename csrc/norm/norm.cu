// Launchers.
#include "common/column_sums.cuh"
#include "norm/norm_row.cuh"

namespace vlmkernels {

Error launch_norm(const NormParams& p, Stream stream) {
    if (p.num_rows == 0) return cudaSuccess;
    if (p.dtype == DType::kFloat32) return launch_norm_typed<float>(p, stream);
    if (p.dtype == DType::kFloat16) return launch_norm_typed<__half>(p, stream);
    return launch_norm_typed<__nv_bfloat16>(p, stream);
}

Error launch_norm_backward(const NormBackwardParams& p, Stream stream) {
    const Error error = p.dtype == DType::kFloat32 ? launch_norm_backward_typed<float>(p, stream)
                        : p.dtype == DType::kFloat16
                            ? launch_norm_backward_typed<__half>(p, stream)
                            : launch_norm_backward_typed<__nv_bfloat16>(p, stream);
    return error != cudaSuccess ? error : launch_column_sums(column_sums_of(p), stream);
}

}  // namespace vlmkernels
