#include "patch_embed/checks.h"

#include <algorithm>

#include "binding/check.h"

namespace vlmkernels {

void expect_like(const Tensor& t, const Tensor& x) {
    expect_same_dtype(t, x);
    expect_same_device(t, x);
    expect_contiguous(t);
}

static std::string patch_text(const Tensor& weight) {
    std::string text;
    for (int i = 2; i < weight.ndim; ++i)
        text += (i > 2 ? ", " : "") + std::to_string(weight.sizes[i]);
    return text;
}

// Enough parts to fill a GPU, and a function of the shape alone, so that results do not depend on
// the GPU.
static int splits_of(int64_t num_patches, int64_t tiles, int64_t enough_ctas) {
    constexpr int64_t kLeastPatches = 512;
    return int(std::max<int64_t>(1, std::min(enough_ctas / tiles, num_patches / kLeastPatches)));
}

int patch_embed_splits(int64_t num_patches, int64_t hidden_dim, int64_t patch_dim) {
    return splits_of(num_patches, (hidden_dim + 127) / 128 * ((patch_dim + 127) / 128), 256);
}

// Tiles of 128 x 224, one on each SM.
int pixels_splits(int64_t num_patches, int64_t hidden_dim, int64_t patch_dim) {
    return splits_of(num_patches, (hidden_dim + 127) / 128 * ((patch_dim + 224) / 224), 132);
}

// What a row of patches has: the sizes of weight (hidden_dim, patch_dim), Conv2d's or Conv3d's.
static Patches patches_of_weight(const Tensor& weight) {
    if (weight.ndim != 2 && weight.ndim != 4 && weight.ndim != 5)
        value_error(weight,
                    "must have shape (hidden_dim, patch_dim), (hidden_dim, channels, patch_h, "
                    "patch_w) or (hidden_dim, channels, patch_t, patch_h, patch_w)",
                    shape_text(weight));
    if (weight.numel() == 0) value_error(weight, "must not be empty", shape_text(weight));
    const int64_t patch_dim = weight.numel() / weight.size(0);
    if (patch_dim >= 1 << 24 || weight.size(0) >= 1 << 24)
        value_error(weight, "must have hidden_dim and patch_dim below 2^24", shape_text(weight));
    return {.patch_dim = int(patch_dim),
            .grid_t = 1,
            .grid_h = 1,
            .grid_w = 1,
            .channels = 1,
            .patch_t = 1,
            .patch_h = 1,
            .patch_w = int(patch_dim),
            .rows = true};
}

// x as a matrix of the patches that weight is made for.
Patches patches_of(const Tensor& x, const Tensor& weight) {
    Patches p = patches_of_weight(weight);
    if (x.ndim == 2) {
        if (x.size(1) != p.patch_dim)
            value_error(
                x, "must have patch_dim = " + std::to_string(p.patch_dim) + " columns like weight",
                shape_text(x));
        p.num_patches = x.size(0);
        p.stride_image = x.stride(0);
    } else {
        if (x.ndim != 4 && x.ndim != 5)
            value_error(x,
                        "must have shape (num_patches, patch_dim), (num_images, channels, h, w) or "
                        "(num_images, channels, t, h, w)",
                        shape_text(x));
        if (weight.ndim != x.ndim)
            value_error(
                weight,
                std::string("must have as many dimensions as ") + x.name + " " + shape_text(x),
                shape_text(weight));
        if (x.size(1) != weight.size(1))
            value_error(x,
                        "must have channels = " + std::to_string(weight.size(1)) + " like weight",
                        shape_text(x));
        for (int i = 2; i < x.ndim; ++i)
            if (x.size(i) < weight.size(i) && x.size(0))
                value_error(x, "must hold at least one patch (" + patch_text(weight) + ")",
                            shape_text(x));
        const bool video = x.ndim == 5;
        p.rows = false;
        p.channels = int(x.size(1));
        p.patch_t = video ? int(weight.size(2)) : 1;
        p.patch_h = int(weight.size(-2));
        p.patch_w = int(weight.size(-1));
        const int64_t t = video ? x.size(2) / p.patch_t : 1, h = x.size(-2) / p.patch_h,
                      w = x.size(-1) / p.patch_w;
        p.num_patches = x.size(0) * t * h * w;
        p.grid_t = int(t), p.grid_h = int(h), p.grid_w = int(w);
        p.stride_image = x.stride(0);
        p.stride_channel = x.stride(1);
        p.stride_t = video ? x.stride(2) : 0;
        p.stride_h = x.stride(-2);
    }
    if (p.num_patches >= int64_t(1) << 30)
        value_error(x, "must have fewer than 2^30 patches", std::to_string(p.num_patches));
    if (p.channels * p.stride_channel + p.patch_t * p.stride_t + p.patch_h * p.stride_h >=
        int64_t(1) << 31)
        value_error(x, "must have fewer than 2^31 elements per image", shape_text(x));
    expect_last_dim_contiguous(x);
    p.dtype = x.dtype;
    return p;
}

int64_t positions_of(const Patches& p) {
    return p.rows || p.images ? p.num_patches : int64_t(p.grid_t) * p.grid_h * p.grid_w;
}

}  // namespace vlmkernels
