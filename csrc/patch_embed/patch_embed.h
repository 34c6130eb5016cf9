// patch_embed: tokens = patches(x) * weight^T + bias + pos_embed, and its gradients.
//   patch_embed.h        what the kernels are given, and the launch declarations
// Pixels are the same with a normalisation per channel in front, folded into weight and bias:
//   tokens = scale * (pixels - centre) * folded_weight^T + folded_bias + pos_embed,
// centre 128 for bytes.
//   patch_embed.h        what the kernels are given, and the launch declarations
//   patches.cuh          x as a matrix of patches, read and written in place
//   pixels.cuh           the same of bytes, of images packed one after another, in blocks
//   patch_embed.cuh      the three matrix products, over common/gemm.cuh
//   readers.cuh          patches of pixels to registers
//   fold.cu              the normalisation into the weight, and the gradient out of it again
//   patch_embed.cu       launchers
//   instances/*.cu       one element type each
//   patch_embed_cpu.cpp  patches as rows, normalised; the matrix product is PyTorch's own there
//   checks.h             x and weight as patches, checked
//   patch_embed.cpp      binding of what takes x in the dtype of weight
//   pixels.cpp           binding of what takes pixels
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/launch.h"

namespace vlmkernels {

// One of several images of different sizes that are packed one after another: its pixels,
// (channels, grid_h * patch_h, grid_w * patch_w), begin at element first_patch * patch_dim.
struct PackedImage {
    int32_t first_patch, grid_h, grid_w, unused;
};

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
    DType dtype = DType::kOther;          // of x
    int merge = 1;                        // patches go in blocks of merge x merge
    const PackedImage* images = nullptr;  // not null: packed; grid and strides are then unused
    int num_images = 0;                   // packed

    // Needs PixelView: bytes, blocks, or images of different sizes.
    bool pixels() const { return dtype == DType::kUInt8 || merge > 1 || images; }
};

struct PatchEmbedParams {
    const void* x;          // patches
    const void* weight;     // [hidden_dim, patch_dim]
    const void* bias;       // [hidden_dim] or null; fp32 when x is pixels
    const void* pos_embed;  // [num_patches of one image, hidden_dim] or null
    void* y;                // [num_patches, hidden_dim]
    Patches patches;
    int64_t weight_stride;  // from row to row
    int64_t hidden_dim;
    int64_t num_positions;  // patches of one image (all patches when x is rows)
    DType dtype;            // of all else: fp16 or bf16
    bool float_bias;        // bias is fp32
    float scale;            // of the product
};

struct PatchEmbedDxParams {
    const void* dy;      // [num_patches, hidden_dim]
    const void* weight;  // [hidden_dim, patch_dim]
    void* dx;            // patches
    Patches patches;     // of dx
    int64_t weight_stride;
    int64_t hidden_dim;
    DType dtype;
    float scale;  // of the product
};

struct PatchEmbedDweightParams {
    const void* dy;        // [num_patches, hidden_dim]
    const void* x;         // patches
    void* dweight;         // [hidden_dim, patch_dim]; null: the splits stay in the workspace
    void* dbias;           // [hidden_dim] or null
    bool sums;             // dbias is wanted, in its own memory or in the workspace
    float* workspace;      // [num_splits, hidden_dim, patch_dim], and a column for dbias if it is
                           // wanted; null: one split
    void* rows = nullptr;  // [num_patches, patch_dim + 1 rounded up to 8], memory for the patches
                           // as rows; null: none
    Patches patches;
    int64_t hidden_dim;
    int num_splits;
    DType dtype;  // of all but bytes
};

constexpr int kMaxChannels = 64;

// How pixels become what weight is made for: x * scale + shift, channel by channel.
struct PixelAffine {
    float scale[kMaxChannels], shift[kMaxChannels];
};

// folded_weight[n, c, i] = scale[c] * sum over frames of weight[n, c, frame, i], rounded, and
// folded_bias[n] = bias[n] + common * sum of shift[c] * folded_weight[n, c, i]. The rounded weight
// is what is multiplied with the centre, too: its error then weighs pixel - mean, not pixel -
// centre. What channels have in common of their scales stays outside, as a factor of the product:
// where all have the same, as in ViT and SigLIP, no weight is rounded at all.
struct FoldParams {
    const void* weight;   // [hidden_dim, channels, frames, plane]
    const void* bias;     // [hidden_dim] or null
    void* folded_weight;  // [hidden_dim, channels, plane], rows folded_stride apart
    float* folded_bias;   // [hidden_dim]
    int64_t folded_stride;
    int64_t hidden_dim;
    int channels, frames, plane;
    PixelAffine affine;  // shift: centre - mean / rescale
    float common;
    DType dtype;  // of weight and bias: fp16 or bf16
};

// The gradients back through the fold: dweight[n, c, frame, i] = scale[c] * (d[n, c, i] + shift[c]
// * d[n, last]) and dbias[n] = d[n, last], d being the sum of the splits.
struct UnfoldParams {
    const float* workspace;  // [num_splits, hidden_dim, channels * plane + 1]
    void* dweight;           // [hidden_dim, channels, frames, plane]
    void* dbias;             // [hidden_dim] or null
    int64_t hidden_dim;
    int num_splits, channels, frames, plane;
    PixelAffine affine;
    DType dtype;
};

struct PatchRowsParams {
    const void* x;  // patches
    void* rows;     // [num_patches, patch_dim]
    Patches patches;
    int channels;  // of affine; patch_dim is a multiple
    bool normalise;
    PixelAffine affine;
    DType dtype;  // of rows; x is that or bytes
};

// Patches as rows.
template <class Isa>
void patch_embed_rows_cpu(const PatchRowsParams& p);

Error launch_patch_embed_fold(const FoldParams& p, Stream stream);
Error launch_patch_embed_unfold(const UnfoldParams& p, Stream stream);
Error launch_patch_embed(const PatchEmbedParams& p, Stream stream);
Error launch_patch_embed_dx(const PatchEmbedDxParams& p, Stream stream);
Error launch_patch_embed_dweight(const PatchEmbedDweightParams& p, Stream stream);

}  // namespace vlmkernels
