// Binding of patch_embed from pixels: bytes or floats, normalised per channel.
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "binding/check.h"
#include "binding/device.h"
#include "common/isa.h"
#include "patch_embed/checks.h"

namespace vlmkernels {

using Numbers = std::vector<double>;

static const char* const kOp = "patch_embed_pixels";

// images as patches: what patches_of takes, or packed (1-dimensional) with a table.
static Patches pixel_patches(const Tensor& images, const Tensor& weight, const Tensor& table,
                             int64_t merge) {
    if (images.ndim != 1) {
        Patches p = patches_of(images, weight);
        p.merge = int(merge);
        if (p.rows && merge != 1)
            value_error(kOp, "merge_size must be 1 for patch rows, which have an order, got " +
                                 std::to_string(merge));
        if (p.num_patches && (p.grid_h % merge || p.grid_w % merge) && !p.rows)
            value_error(images, "must have multiples of merge_size patches along h and w",
                        std::to_string(p.grid_h) + " x " + std::to_string(p.grid_w));
        return p;
    }
    if (weight.ndim != 4)
        value_error(weight, "must be Conv2d's or Conv3d's for packed images", shape_text(weight));
    Patches p{.num_patches = 0,
              .patch_dim = int(weight.numel() / weight.size(0)),
              .grid_t = 1,
              .channels = int(weight.size(1)),
              .patch_t = 1,
              .patch_h = int(weight.size(2)),
              .patch_w = int(weight.size(3)),
              .dtype = images.dtype,
              .merge = int(merge),
              .images = table.ptr<PackedImage>(),
              .num_images = int(table.given ? table.size(0) : 0)};
    if (images.numel() % p.patch_dim || images.numel() / p.patch_dim >= int64_t(1) << 30)
        value_error(images,
                    "must hold whole patches of " + std::to_string(p.patch_dim) +
                        " pixels, and fewer than 2^30",
                    std::to_string(images.numel()) + " pixels");
    expect_contiguous(images);
    p.num_patches = images.numel() / p.patch_dim;
    return p;
}

static int64_t expect_normalisation(const Tensor& weight, const Numbers& mean, const Numbers& std,
                                    double rescale) {
    const int64_t patch_dim = weight.numel() / std::max<int64_t>(1, weight.size(0));
    const int64_t channels = weight.ndim > 2 ? weight.size(1) : int64_t(mean.size());
    if (channels < 1 || channels > kMaxChannels || patch_dim % channels)
        value_error(weight, "must have 1 to 64 channels", std::to_string(channels));
    auto expect = [&](const char* name, const Numbers& values, bool positive) {
        if (int64_t(values.size()) != channels)
            value_error(kOp, std::string(name) + " must have a value for each of " +
                                 std::to_string(channels) + " channels, got " +
                                 std::to_string(values.size()));
        for (double value : values)
            if (!std::isfinite(value) || (positive && value <= 0))
                value_error(kOp, std::string(name) + (positive ? " must be positive" : "") +
                                     (positive ? " and finite, got " : " must be finite, got ") +
                                     std::to_string(value));
    };
    expect("mean", mean, false);
    expect("std", std, true);
    if (!std::isfinite(rescale) || rescale <= 0)
        value_error(kOp, "rescale must be positive and finite, got " + std::to_string(rescale));
    return channels;
}

// Fills table from the grid (num_images, 3) of packed images.
static void fill_table(const Tensor& grid, const Patches& p, int64_t merge, const Tensor& table) {
    expect_dtype(grid, kInts);
    expect_contiguous(grid);
    auto value = [&](int64_t i) {
        return grid.dtype == DType::kInt64 ? grid.ptr<int64_t>()[i] : grid.ptr<int32_t>()[i];
    };
    if (grid.ndim != 2 || grid.size(1) != 3)
        value_error(grid, "must have shape (num_images, 3)", shape_text(grid));
    int64_t first = 0;
    for (int64_t i = 0; i < grid.size(0); ++i) {
        const int64_t t = value(i * 3), h = value(i * 3 + 1), w = value(i * 3 + 2);
        const std::string got =
            "(" + std::to_string(t) + ", " + std::to_string(h) + ", " + std::to_string(w) + ")";
        if (t != 1 || h < 1 || w < 1 || h > 1 << 24 || w > 1 << 24 || h % merge || w % merge)
            value_error(grid,
                        "must hold (1, h, w) with positive multiples of merge_size = " +
                            std::to_string(merge),
                        got + " for image " + std::to_string(i));
        if (h * w * p.patch_dim >= int64_t(1) << 31)
            value_error(grid, "must hold images of fewer than 2^31 pixels and channels", got);
        table.ptr<PackedImage>()[i] = {int32_t(first), int32_t(h), int32_t(w), 0};
        first += h * w;
        if (first > p.num_patches) break;
    }
    if (first != p.num_patches)
        value_error(grid, "must count the " + std::to_string(p.num_patches) + " patches of images",
                    std::to_string(first) + (first > p.num_patches ? " or more" : ""));
}

// Checks everything before anything is launched. folded: memory of the shape of the folded weight;
// table: [num_images, 4] int32 on the CPU, filled here for packed images.
static void check(py::handle images_, py::handle weight_, py::handle folded_, py::handle bias_,
                  py::handle pos_embed_, py::handle grid_, py::handle table_, const Numbers& mean,
                  const Numbers& std, double rescale, int64_t merge) {
    Tensor images(kOp, "images", images_), weight(kOp, "weight", weight_),
        folded(kOp, "weight", folded_), bias(kOp, "bias", bias_, true),
        pos_embed(kOp, "pos_embed", pos_embed_, true), grid(kOp, "grid_thw", grid_, true),
        table(kOp, "table", table_, true);
    expect_dtype(weight, kFloats);
    if (images.dtype != DType::kUInt8 && images.dtype != weight.dtype)
        type_error(images,
                   std::string("must be uint8 or of weight's dtype ") + dtype_text(weight.dtype),
                   dtype_text(images.dtype));
    expect_same_device(images, weight);
    if (merge < 1 || merge > 1024)
        value_error(kOp, "merge_size must be at least 1, got " + std::to_string(merge));
    if (images.ndim != 1 && images.ndim != 2 && images.ndim != 4 && images.ndim != 5)
        value_error(images,
                    "must have shape (num_images, channels, h, w), (num_images, channels, t, h, "
                    "w), (num_patches, patch_dim), or one dimension when packed",
                    shape_text(images));
    if ((images.ndim == 1) != grid.given)
        value_error(kOp, images.ndim == 1 ? "grid_thw must be given for packed images, got None"
                                          : "grid_thw must be None but for packed images");
    const Patches p = pixel_patches(images, folded, table, merge);
    expect_normalisation(weight, mean, std, rescale);
    if (grid.given) fill_table(grid, p, merge, table);
    if (bias.given) {
        expect_like(bias, weight);
        expect_shape(bias, {weight.size(0)}, "(hidden_dim,)");
    }
    if (pos_embed.given) {
        expect_like(pos_embed, weight);
        expect_shape(pos_embed, {positions_of(p), weight.size(0)}, "(num_patches, hidden_dim)");
    }
}

// common: the factor that stays outside of the folded weight.
static PixelAffine folding(const Numbers& mean, const Numbers& std, double rescale, double centre,
                           double common) {
    PixelAffine affine = {};
    for (size_t i = 0; i < mean.size(); ++i) {
        affine.scale[i] = float(rescale / std[i] / common);
        affine.shift[i] = float(centre - mean[i] / rescale);
    }
    return affine;
}

// weight viewed as [hidden_dim, channels, frames, plane].
template <class Params>
static Params fold_params(const Tensor& weight, const Tensor& folded, const Numbers& mean) {
    const int64_t columns = folded.numel() / folded.size(0);
    Params p = {};
    p.hidden_dim = weight.size(0);
    p.channels = int(mean.size());
    p.frames = int(weight.numel() / folded.numel());
    p.plane = int(columns / p.channels);
    p.dtype = weight.dtype;
    return p;
}

// centre: what the kernels subtract from pixels.
static bool fold(py::handle weight_, py::handle bias_, const Numbers& mean, const Numbers& std,
                 double rescale, double centre, py::handle folded_, py::handle folded_bias_) {
    Tensor weight(kOp, "weight", weight_), bias(kOp, "bias", bias_, true),
        folded(kOp, "folded_weight", folded_), folded_bias(kOp, "folded_bias", folded_bias_);
    expect_contiguous(weight);
    expect_normalisation(weight, mean, std, rescale);
    auto p = fold_params<FoldParams>(weight, folded, mean);
    p.weight = weight.data;
    p.bias = bias.data;
    p.folded_weight = folded.data;
    p.folded_bias = folded_bias.ptr<float>();
    p.folded_stride = folded.stride(0);
    p.common = float(rescale / std[0]);
    p.affine = folding(mean, std, rescale, centre, rescale / std[0]);
    return has_kernel(weight.dtype) &&
           run(weight, [&](Stream stream) { return launch_patch_embed_fold(p, stream); }, nullptr);
}

static bool pixels(py::handle images_, py::handle weight_, py::handle bias_, py::handle pos_embed_,
                   py::handle table_, int64_t merge, float scale, py::handle y_) {
    Tensor images(kOp, "images", images_), weight(kOp, "weight", weight_),
        bias(kOp, "bias", bias_, true), pos_embed(kOp, "pos_embed", pos_embed_, true),
        table(kOp, "table", table_, true), y(kOp, "y", y_);
    expect_same_dtype(weight, y);
    if (bias.given) expect_dtype(bias, {DType::kFloat32});
    PatchEmbedParams p{.x = images.data,
                       .weight = weight.data,
                       .bias = bias.data,
                       .pos_embed = pos_embed.data,
                       .y = y.data,
                       .patches = pixel_patches(images, weight, table, merge),
                       .weight_stride = weight.stride(0),
                       .hidden_dim = weight.size(0),
                       .num_positions = 0,
                       .dtype = y.dtype,
                       .float_bias = true,
                       .scale = scale};
    p.num_positions = positions_of(p.patches);
    return has_kernel(y.dtype) &&
           run(y, [&](Stream stream) { return launch_patch_embed(p, stream); }, nullptr);
}

static bool pixels_dx(py::handle dy_, py::handle weight_, py::handle table_, int64_t merge,
                      float scale, py::handle dx_) {
    Tensor dy(kOp, "dy", dy_), weight(kOp, "weight", weight_), table(kOp, "table", table_, true),
        dx(kOp, "dx", dx_);
    expect_like(dy, dx);
    expect_same_dtype(weight, dx);
    PatchEmbedDxParams p{.dy = dy.data,
                         .weight = weight.data,
                         .dx = dx.data,
                         .patches = pixel_patches(dx, weight, table, merge),
                         .weight_stride = weight.stride(0),
                         .hidden_dim = weight.size(0),
                         .dtype = dy.dtype,
                         .scale = scale};
    return has_kernel(dy.dtype) &&
           run(dy, [&](Stream stream) { return launch_patch_embed_dx(p, stream); }, nullptr);
}

// folded: memory of the shape of the folded weight.
static bool pixels_dweight(py::handle dy_, py::handle images_, py::handle folded_,
                           py::handle table_, int64_t merge, const Numbers& mean,
                           const Numbers& std, double rescale, double centre, py::handle rows_,
                           py::handle workspace_, py::handle dweight_, py::handle dbias_) {
    Tensor dy(kOp, "dy", dy_), images(kOp, "images", images_), folded(kOp, "weight", folded_),
        table(kOp, "table", table_, true), rows(kOp, "rows", rows_),
        workspace(kOp, "workspace", workspace_), dweight(kOp, "dweight", dweight_),
        dbias(kOp, "dbias", dbias_, true);
    const Patches patches = pixel_patches(images, folded, table, merge);
    const int64_t hidden_dim = folded.size(0);
    const int splits = pixels_splits(patches.num_patches, hidden_dim, patches.patch_dim);
    expect_like(dy, dweight);
    expect_like(rows, dweight);
    expect_shape(rows, {patches.num_patches, (patches.patch_dim + 8) / 8 * 8},
                 "(num_patches, patch_dim + 1 rounded up to 8)");
    expect_dtype(workspace, {DType::kFloat32});
    expect_shape(workspace, {splits, hidden_dim, patches.patch_dim + 1},
                 "(num_splits, hidden_dim, patch_dim + 1)");
    PatchEmbedDweightParams p{.dy = dy.data,
                              .x = images.data,
                              .dweight = nullptr,
                              .dbias = nullptr,
                              .sums = true,
                              .workspace = workspace.ptr<float>(),
                              .rows = rows.data,
                              .patches = patches,
                              .hidden_dim = hidden_dim,
                              .num_splits = splits,
                              .dtype = dy.dtype};
    auto unfold = fold_params<UnfoldParams>(dweight, folded, mean);
    unfold.workspace = p.workspace;
    unfold.dweight = dweight.data;
    unfold.dbias = dbias.data;
    unfold.num_splits = splits;
    unfold.affine = folding(mean, std, rescale, centre, 1);
    auto launch = [&](Stream stream) {
        const Error error = launch_patch_embed_dweight(p, stream);
        return error ? error : launch_patch_embed_unfold(unfold, stream);
    };
    return has_kernel(dy.dtype) && run(dy, launch, nullptr);
}

// Patches as rows, on the CPU: normalised, or, where mean is empty, as they are.
static bool rows(py::handle images_, py::handle weight_, py::handle table_, int64_t merge,
                 const Numbers& mean, const Numbers& std, double rescale, py::handle rows_) {
    Tensor images(kOp, "images", images_), weight(kOp, "weight", weight_),
        table(kOp, "table", table_, true), rows(kOp, "rows", rows_);
    const Patches patches = pixel_patches(images, weight, table, merge);
    expect_shape(rows, {patches.num_patches, patches.patch_dim}, "(num_patches, patch_dim)");
    PatchRowsParams p{.x = images.data,
                      .rows = rows.data,
                      .patches = patches,
                      .channels = mean.empty() ? patches.channels : int(mean.size()),
                      .normalise = !mean.empty(),
                      .affine = {},
                      .dtype = rows.dtype};
    for (size_t i = 0; i < mean.size(); ++i) {
        p.affine.scale[i] = float(rescale / std[i]);
        p.affine.shift[i] = float(-mean[i] / std[i]);
    }
    auto cpu = [&] { dispatch_isa([&]<class Isa>() { patch_embed_rows_cpu<Isa>(p); }); };
    return rows.dtype != DType::kFloat64 && run(rows, nullptr, cpu);
}

static const Binding binding([](py::module_& m) {
    m.def("patch_embed_check_pixels", &check);
    m.def("patch_embed_fold", &fold);
    m.def("patch_embed_pixels", &pixels);
    m.def("patch_embed_pixels_dx", &pixels_dx);
    m.def("patch_embed_pixels_dweight", &pixels_dweight);
    m.def("patch_embed_pixels_splits", &pixels_splits);
    m.def("patch_embed_rows", &rows);
});

}  // namespace vlmkernels
