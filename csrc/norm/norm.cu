// Launchers, and the second stage of the weight gradients: column sums of the partials.
#include "common/vector.cuh"
#include "norm/norm_row.cuh"

namespace vlmkernels {

constexpr int kColumns = 32, kSlices = 16;

// blockIdx.y: 0 sums dweight, 1 dbias. A warp reads 32 columns of one partial at a time.
__global__ void __launch_bounds__(kColumns* kSlices)
    norm_sum_partials_kernel(const __grid_constant__ NormBackwardParams p) {
    __shared__ float sums[kSlices][kColumns];
    const float* partials = blockIdx.y ? p.dbias_partials : p.dweight_partials;
    void* out = blockIdx.y ? p.dbias : p.dweight;
    if (!out) return;
    const int column = blockIdx.x * kColumns + threadIdx.x;
    float sum = 0.0f;
    if (column < p.hidden_dim)
        for (int i = threadIdx.y; i < p.num_partials; i += kSlices)
            sum += partials[int64_t(i) * p.hidden_dim + column];
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y || column >= p.hidden_dim) return;
    for (int i = 1; i < kSlices; ++i) sum += sums[i][threadIdx.x];
    if (p.weight_dtype == DType::kFloat32)
        static_cast<float*>(out)[column] = sum;
    else if (p.weight_dtype == DType::kFloat16)
        static_cast<__half*>(out)[column] = from_float<__half>(sum);
    else
        static_cast<__nv_bfloat16*>(out)[column] = from_float<__nv_bfloat16>(sum);
}

Error launch_norm(const NormParams& p, Stream stream) {
    if (p.num_rows == 0) return cudaSuccess;
    if (p.dtype == DType::kFloat32) return launch_norm_typed<float>(p, stream);
    if (p.dtype == DType::kFloat16) return launch_norm_typed<__half>(p, stream);
    return launch_norm_typed<__nv_bfloat16>(p, stream);
}

Error launch_norm_backward(const NormBackwardParams& p, Stream stream) {
    Error error = p.dtype == DType::kFloat32 ? launch_norm_backward_typed<float>(p, stream)
                  : p.dtype == DType::kFloat16
                      ? launch_norm_backward_typed<__half>(p, stream)
                      : launch_norm_backward_typed<__nv_bfloat16>(p, stream);
    if (error != cudaSuccess || (!p.dweight && !p.dbias)) return error;
    const dim3 grid((p.hidden_dim + kColumns - 1) / kColumns, p.dbias ? 2 : 1);
    norm_sum_partials_kernel<<<grid, dim3(kColumns, kSlices), 0, stream>>>(p);
    return cudaGetLastError();
}

}  // namespace vlmkernels
