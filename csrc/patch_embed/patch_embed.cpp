#include "patch_embed/patch_embed.h"

#include <algorithm>

#include "binding/check.h"
#include "binding/device.h"

namespace vlmkernels {

static void expect_like(const Tensor& t, const Tensor& x) {
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

// Parts of the sum over patches that dweight is computed in: enough to fill a GPU, and a function
// of the shape alone, so that results do not depend on the GPU.
static int patch_embed_splits(int64_t num_patches, int64_t hidden_dim, int64_t patch_dim) {
    constexpr int64_t kTile = 128, kEnoughCtas = 256, kLeastPatches = 512;
    const int64_t tiles = ((hidden_dim + kTile - 1) / kTile) * ((patch_dim + kTile - 1) / kTile);
    const int64_t wanted = kEnoughCtas / tiles, most = num_patches / kLeastPatches;
    return int(std::max<int64_t>(1, std::min(wanted, most)));
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
static Patches patches_of(const Tensor& x, const Tensor& weight) {
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
            value_error(weight, "must have as many dimensions as x " + shape_text(x),
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
    return p;
}

static bool has_kernel(DType dtype) {
    return dtype == DType::kFloat16 || dtype == DType::kBFloat16;
}

static bool patch_embed(py::handle x_, py::handle weight_, py::handle bias_, py::handle pos_embed_,
                        py::handle y_) {
    const char* op = "patch_embed";
    Tensor x(op, "x", x_), weight(op, "weight", weight_), bias(op, "bias", bias_, true),
        pos_embed(op, "pos_embed", pos_embed_, true), y(op, "y", y_);
    expect_dtype(x, kFloats);
    expect_like(weight, x);
    const Patches patches = patches_of(x, weight);
    const int64_t hidden_dim = weight.size(0);
    const int64_t positions = patches.rows
                                  ? patches.num_patches
                                  : int64_t(patches.grid_t) * patches.grid_h * patches.grid_w;
    if (bias.given) {
        expect_like(bias, x);
        expect_shape(bias, {hidden_dim}, "(hidden_dim,)");
    }
    if (pos_embed.given) {
        expect_like(pos_embed, x);
        expect_shape(pos_embed, {positions, hidden_dim}, "(num_patches, hidden_dim)");
    }
    expect_like(y, x);
    PatchEmbedParams p{.x = x.data,
                       .weight = weight.data,
                       .bias = bias.data,
                       .pos_embed = pos_embed.data,
                       .y = y.data,
                       .patches = patches,
                       .hidden_dim = hidden_dim,
                       .num_positions = positions,
                       .dtype = x.dtype};
    return has_kernel(x.dtype) &&
           run(x, [&](Stream stream) { return launch_patch_embed(p, stream); }, nullptr);
}

static bool patch_embed_dx(py::handle dy_, py::handle weight_, py::handle dx_) {
    const char* op = "patch_embed_dx";
    Tensor dy(op, "dy", dy_), weight(op, "weight", weight_), dx(op, "dx", dx_);
    expect_dtype(dy, kFloats);
    expect_like(dy, dy);
    expect_like(weight, dy);
    expect_like(dx, dy);
    const Patches patches = patches_of(dx, weight);
    const int64_t hidden_dim = weight.size(0);
    if (dy.numel() != patches.num_patches * hidden_dim)
        value_error(dy, "must have a row of hidden_dim for each patch of dx", shape_text(dy));
    PatchEmbedDxParams p{.dy = dy.data,
                         .weight = weight.data,
                         .dx = dx.data,
                         .patches = patches,
                         .hidden_dim = hidden_dim,
                         .dtype = dy.dtype};
    return has_kernel(dy.dtype) &&
           run(dy, [&](Stream stream) { return launch_patch_embed_dx(p, stream); }, nullptr);
}

static bool patch_embed_dweight(py::handle dy_, py::handle x_, py::handle dweight_,
                                py::handle dbias_, py::handle workspace_) {
    const char* op = "patch_embed_dweight";
    Tensor dy(op, "dy", dy_), x(op, "x", x_), dweight(op, "dweight", dweight_),
        dbias(op, "dbias", dbias_, true), workspace(op, "workspace", workspace_, true);
    expect_dtype(dy, kFloats);
    expect_like(dy, dy);
    expect_same_dtype(x, dy);
    expect_same_device(x, dy);
    expect_like(dweight, dy);
    const Patches patches = patches_of(x, dweight);
    const int64_t hidden_dim = dweight.size(0);
    if (dy.numel() != patches.num_patches * hidden_dim)
        value_error(dy, "must have a row of hidden_dim for each patch of x", shape_text(dy));
    if (dbias.given) {
        expect_like(dbias, dy);
        expect_shape(dbias, {hidden_dim}, "(hidden_dim,)");
    }
    const int splits = patch_embed_splits(patches.num_patches, hidden_dim, patches.patch_dim);
    if (workspace.given) {
        expect_dtype(workspace, {DType::kFloat32});
        expect_same_device(workspace, dy);
        expect_contiguous(workspace);
        expect_shape(workspace, {splits, hidden_dim, patches.patch_dim + dbias.given},
                     dbias.given ? "(num_splits, hidden_dim, patch_dim + 1)"
                                 : "(num_splits, hidden_dim, patch_dim)");
    }
    PatchEmbedDweightParams p{.dy = dy.data,
                              .x = x.data,
                              .dweight = dweight.data,
                              .dbias = dbias.data,
                              .workspace = workspace.ptr<float>(),
                              .patches = patches,
                              .hidden_dim = hidden_dim,
                              .num_splits = workspace.given ? splits : 1,
                              .dtype = dy.dtype};
    return has_kernel(dy.dtype) &&
           run(dy, [&](Stream stream) { return launch_patch_embed_dweight(p, stream); }, nullptr);
}

static const Binding binding([](py::module_& m) {
    m.def("patch_embed", &patch_embed);
    m.def("patch_embed_dx", &patch_embed_dx);
    m.def("patch_embed_dweight", &patch_embed_dweight);
    m.def("patch_embed_splits", &patch_embed_splits);
});

}  // namespace vlmkernels
