// The normalisation of pixels into the weight of a patch embedding, and gradients out of it again.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "common/grid.cuh"
#include "common/launch.cuh"
#include "common/reduce.cuh"
#include "common/vector.cuh"
#include "patch_embed/patch_embed.h"

namespace vlmkernels {

constexpr int kThreads = 256;

// One CTA for each row of weight.
template <class T>
__global__ void __launch_bounds__(kThreads)
    patch_embed_fold_kernel(const __grid_constant__ FoldParams p) {
    __shared__ float scratch[kThreads / 32];
    const int64_t row = blockIdx.x;
    const int columns = p.channels * p.plane;
    const T* weight = static_cast<const T*>(p.weight) + row * columns * p.frames;
    T* folded = static_cast<T*>(p.folded_weight) + row * p.folded_stride;
    float sum[1] = {};
    for (int column = threadIdx.x; column < columns; column += kThreads) {
        const int channel = column / p.plane;
        const T* from = weight + channel * (p.frames - 1) * p.plane + column;
        float value = 0;
        for (int frame = 0; frame < p.frames; ++frame) value += to_float(from[frame * p.plane]);
        folded[column] = from_float<T>(value * p.affine.scale[channel]);
        sum[0] += to_float(folded[column]) * p.affine.shift[channel];
    }
    group_sum<kThreads>(sum, scratch);
    if (threadIdx.x) return;
    const float bias = p.bias ? to_float(static_cast<const T*>(p.bias)[row]) : 0.f;
    p.folded_bias[row] = bias + p.common * sum[0];
}

// Adds the splits in order: the result does not depend on which CTA was first.
template <class T>
__global__ void __launch_bounds__(kThreads)
    patch_embed_unfold_kernel(const __grid_constant__ UnfoldParams p) {
    const int columns = p.channels * p.plane, width = columns + 1;
    const int64_t size = p.hidden_dim * width;
    auto sum_of = [&](int64_t at) {
        float sum = 0;
        for (int split = 0; split < p.num_splits; ++split) sum += p.workspace[split * size + at];
        return sum;
    };
    for (int64_t i = thread_index(); i < size; i += thread_count()) {
        const int64_t row = i / width;
        const int column = int(i - row * width);
        const float dbias = sum_of(row * width + columns);
        if (column == columns) {
            if (p.dbias) static_cast<T*>(p.dbias)[row] = from_float<T>(dbias);
            continue;
        }
        const int channel = column / p.plane;
        const float value = p.affine.scale[channel] * (sum_of(i) + p.affine.shift[channel] * dbias);
        T* to = static_cast<T*>(p.dweight) + row * columns * p.frames +
                channel * (p.frames - 1) * p.plane + column;
        for (int frame = 0; frame < p.frames; ++frame) to[frame * p.plane] = from_float<T>(value);
    }
}

Error launch_patch_embed_fold(const FoldParams& p, Stream stream) {
    auto* kernel = p.dtype == DType::kFloat16 ? patch_embed_fold_kernel<__half>
                                              : patch_embed_fold_kernel<__nv_bfloat16>;
    return launch(kernel, p.hidden_dim, kThreads, 0, stream, p);
}

Error launch_patch_embed_unfold(const UnfoldParams& p, Stream stream) {
    auto* kernel = p.dtype == DType::kFloat16 ? patch_embed_unfold_kernel<__half>
                                              : patch_embed_unfold_kernel<__nv_bfloat16>;
    const int64_t size = p.hidden_dim * (int64_t(p.channels) * p.plane + 1);
    return launch(kernel, grid_for(size, kThreads), kThreads, 0, stream, p);
}

}  // namespace vlmkernels
