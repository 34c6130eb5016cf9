#include "patch_embed/patch_embed.h"

#include "binding/check.h"
#include "binding/device.h"
#include "patch_embed/checks.h"

namespace vlmkernels {

static bool patch_embed(py::handle x_, py::handle weight_, py::handle bias_, py::handle pos_embed_,
                        py::handle y_) {
    const char* op = "patch_embed";
    Tensor x(op, "x", x_), weight(op, "weight", weight_), bias(op, "bias", bias_, true),
        pos_embed(op, "pos_embed", pos_embed_, true), y(op, "y", y_);
    expect_dtype(x, kFloats);
    expect_like(weight, x);
    const Patches patches = patches_of(x, weight);
    const int64_t hidden_dim = weight.size(0);
    const int64_t positions = positions_of(patches);
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
                       .weight_stride = patches.patch_dim,
                       .hidden_dim = hidden_dim,
                       .num_positions = positions,
                       .dtype = x.dtype,
                       .float_bias = false,
                       .scale = 1.f};
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
                         .weight_stride = patches.patch_dim,
                         .hidden_dim = hidden_dim,
                         .dtype = dy.dtype,
                         .scale = 1.f};
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
                              .sums = dbias.given,
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
