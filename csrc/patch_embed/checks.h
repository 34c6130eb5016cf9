// Tensors as the kernels of patch_embed take them, checked.
#pragma once

#include "patch_embed/patch_embed.h"

namespace vlmkernels {

struct Tensor;

// Contiguous, and of the dtype and device of x.
void expect_like(const Tensor& t, const Tensor& x);

// x as a matrix of the patches that weight is made for: rows (num_patches, patch_dim), images or
// video.
Patches patches_of(const Tensor& x, const Tensor& weight);

// Patches of one image: positions of pos_embed.
int64_t positions_of(const Patches& p);

inline bool has_kernel(DType dtype) {
    return dtype == DType::kFloat16 || dtype == DType::kBFloat16;
}

// Parts of the sum over patches that dweight is computed in.
int patch_embed_splits(int64_t num_patches, int64_t hidden_dim, int64_t patch_dim);
int pixels_splits(int64_t num_patches, int64_t hidden_dim, int64_t patch_dim);

}  // namespace vlmkernels
