// patch_embed: tokens = patches(x) * weight^T + bias + pos_embed, and its gradients.
//   patch_embed.h        what the kernels are given, and the launch declarations
//   patches.cuh          x as a matrix of patches, read and written in place
//   patch_embed.cuh      the three matrix products, over common/gemm.cuh
//   patch_embed.cu       launchers
//   instances/*.cu       one element type each
//   patch_embed.cpp      argument checks and binding
// On the CPU the same matrix product is PyTorch's own.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/launch.h"

namespace vlmkernels {

// x (num_images, channels, t, h, w), whose last dimension is contiguous, as a matrix
// (num_patches, patch_dim): patches in the order (image, t, h, w), columns in the order
// (channel, t, h, w) within a patch. Strides count elements. Patch rows (num_patches, patch_dim)
// are num_patches images of one patch, one channel, one frame and one line.
struct Patches {
    int64_t num_patches;  // of all images
    int patch_dim;        // channels * patch_t * patch_h * patch_w
    int grid_t, grid_h, grid_w;
    int channels, patch_t, patch_h, patch_w;
    int64_t stride_image, stride_channel, stride_t, stride_h;
    bool rows;
};

struct PatchEmbedParams {
    const void* x;          // patches
    const void* weight;     // [hidden_dim, patch_dim]
    const void* bias;       // [hidden_dim] or null
    const void* pos_embed;  // [num_patches of one image, hidden_dim] or null
    void* y;                // [num_patches, hidden_dim]
    Patches patches;
    int64_t hidden_dim;
    int64_t num_positions;  // patches of one image (all patches when x is rows)
    DType dtype;            // of all tensors: fp16 or bf16
};

struct PatchEmbedDxParams {
    const void* dy;      // [num_patches, hidden_dim]
    const void* weight;  // [hidden_dim, patch_dim]
    void* dx;            // patches
    Patches patches;     // of dx
    int64_t hidden_dim;
    DType dtype;
};

struct PatchEmbedDweightParams {
    const void* dy;    // [num_patches, hidden_dim]
    const void* x;     // patches
    void* dweight;     // [hidden_dim, patch_dim]
    void* dbias;       // [hidden_dim] or null
    float* workspace;  // [num_splits, hidden_dim, patch_dim], and a column for dbias if there is
                       // one; null: one split
    Patches patches;
    int64_t hidden_dim;
    int num_splits;
    DType dtype;
};

Error launch_patch_embed(const PatchEmbedParams& p, Stream stream);
Error launch_patch_embed_dx(const PatchEmbedDxParams& p, Stream stream);
Error launch_patch_embed_dweight(const PatchEmbedDweightParams& p, Stream stream);

}  // namespace vlmkernels
