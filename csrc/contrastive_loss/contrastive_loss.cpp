#include "contrastive_loss/contrastive_loss.h"

#include <vector>

#include "binding/check.h"
#include "binding/device.h"
#include "common/isa.h"

namespace vlmkernels {

static bool is_half(DType dtype) { return dtype == DType::kFloat16 || dtype == DType::kBFloat16; }

static DType compute_dtype(DType dtype) {
    return dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
}

// A vector of statistics, or one value where there is no name for the size.
static void expect_statistics(const Tensor& t, const Tensor& like, DType dtype,
                              std::initializer_list<int64_t> shape, const char* words) {
    if (!t.given) return;
    expect_dtype(t, {dtype});
    expect_same_device(t, like);
    expect_shape(t, shape, words);
    expect_contiguous(t);
}

static void expect_scalar(const Tensor& t, const Tensor& like) {
    if (!t.given) return;
    expect_dtype(t, {compute_dtype(like.dtype)});
    expect_same_device(t, like);
    if (t.numel() != 1) value_error(t, "must be one value", shape_text(t));
}

static ContrastivePairs pairs_of(const Tensor& image, const Tensor& text, const Tensor& scale,
                                 const Tensor& bias, bool positives, int64_t panel_rows) {
    expect_dtype(image, kFloats);
    const auto [num_images, dim] = image.unpack<2>("(batch, dim)");
    const auto [num_texts, text_dim] = text.unpack<2>("(batch, dim)");
    expect_same_dtype(text, image);
    expect_same_device(text, image);
    if (text_dim != dim || (positives && num_texts != num_images))
        value_error(text,
                    std::string("must have the shape of ") + image.name + " " + shape_text(image),
                    shape_text(text));
    if (num_images >= 1 << 28 || num_texts >= 1 << 28 || dim >= 1 << 24)
        value_error(image, "must have batch below 2^28 and dim below 2^24", shape_text(image));
    expect_contiguous(image);
    expect_contiguous(text);
    expect_scalar(scale, image);
    expect_scalar(bias, image);
    return {.image = image.data,
            .text = text.data,
            .logit_scale = scale.ptr<const float>(),
            .logit_bias = bias.ptr<const float>(),
            .num_images = int(num_images),
            .num_texts = int(num_texts),
            .dim = int(dim),
            .panel_rows = int(panel_rows),
            .positives = positives,
            .dtype = image.dtype};
}

static void expect_panel_rows(const Tensor& image, int64_t panel_rows) {
    if (panel_rows < 1 || panel_rows > image.size(0))
        value_error(image.op, "panel_rows must be between 1 and the rows of image " +
                                  shape_text(image) + ", got " + std::to_string(panel_rows));
}

static bool contrastive_forward(py::handle image_, py::handle text_, py::handle scale_,
                                py::handle bias_, bool positives, py::handle image_lse_,
                                py::handle text_lse_, py::handle positive_, py::handle losses_,
                                py::handle workspace_, int64_t panel_rows) {
    const char* op = "contrastive_loss";
    Tensor image(op, "image_features", image_), text(op, "text_features", text_),
        scale(op, "logit_scale", scale_), bias(op, "logit_bias", bias_, true),
        image_lse(op, "image_lse", image_lse_, true), text_lse(op, "text_lse", text_lse_, true),
        positive(op, "positive", positive_, true), losses(op, "losses", losses_, true),
        workspace(op, "workspace", workspace_, true);
    const ContrastivePairs pairs = pairs_of(image, text, scale, bias, positives, panel_rows);
    const DType compute = compute_dtype(image.dtype);
    const int64_t m = pairs.num_images, n = pairs.num_texts;
    expect_statistics(image_lse, image, compute, {2, m}, "(2, batch)");
    expect_statistics(text_lse, image, compute, {2, n}, "(2, batch)");
    expect_statistics(positive, image, compute, {m}, "(batch,)");
    expect_statistics(losses, image, compute, {m}, "(batch,)");
    if (image_lse.given != text_lse.given || image_lse.given == losses.given ||
        (image_lse.given && positives && !positive.given))
        value_error(op, "statistics are those of CLIP (image_lse, text_lse, positive) or losses");
    if (!workspace.given || image.numel() == 0 || text.numel() == 0) return false;
    expect_panel_rows(image, panel_rows);
    expect_statistics(workspace, image, DType::kFloat32, {contrastive_workspace(panel_rows, n)},
                      "(contrastive_workspace,)");
    expect_aligned(workspace);
    const ContrastiveForwardParams p{.pairs = pairs,
                                     .image_lse = image_lse.ptr<float>(),
                                     .text_lse = text_lse.ptr<float>(),
                                     .positive = positive.ptr<float>(),
                                     .losses = losses.ptr<float>(),
                                     .workspace = workspace.ptr<float>()};
    return is_half(image.dtype) &&
           run(
               image, [&](Stream stream) { return launch_contrastive_forward(p, stream); },
               nullptr);
}

static bool contrastive_backward(py::handle image_, py::handle text_, py::handle scale_,
                                 py::handle bias_, bool positives, py::handle image_lse_,
                                 py::handle text_lse_, float image_weight, float text_weight,
                                 py::handle factor_, py::handle dimage_, py::handle dtext_,
                                 py::handle sums_, py::handle panel_) {
    const char* op = "contrastive_loss_backward";
    Tensor image(op, "image_features", image_), text(op, "text_features", text_),
        scale(op, "logit_scale", scale_), bias(op, "logit_bias", bias_, true),
        image_lse(op, "image_lse", image_lse_, true), text_lse(op, "text_lse", text_lse_, true),
        factor(op, "factor", factor_), dimage(op, "dimage", dimage_, true),
        dtext(op, "dtext", dtext_, true), sums(op, "sums", sums_, true),
        panel(op, "panel", panel_, true);
    const DType compute = compute_dtype(image.dtype);
    const int64_t rows = panel.given ? panel.unpack<2>("(panel_rows, panel_stride)")[0] : 1;
    const ContrastivePairs pairs = pairs_of(image, text, scale, bias, positives, rows);
    const int64_t m = pairs.num_images, n = pairs.num_texts, dim = pairs.dim;
    expect_statistics(image_lse, image, compute, {2, m}, "(2, batch)");
    expect_statistics(text_lse, image, compute, {2, n}, "(2, batch)");
    if (image_lse.given != text_lse.given)
        value_error(op, "image_lse and text_lse are given together, or neither is");
    expect_scalar(factor, image);
    expect_statistics(dimage, image, compute, {m, dim}, "(batch, dim)");
    expect_statistics(dtext, image, compute, {n, dim}, "(batch, dim)");
    if (!panel.given || image.numel() == 0 || text.numel() == 0) return false;
    expect_panel_rows(image, rows);
    const int64_t num_sums = contrastive_num_sums(rows, n), stride = (n + 7) / 8 * 8;
    expect_statistics(sums, image, DType::kFloat32, {2, num_sums}, "(2, num_sums)");
    expect_statistics(panel, image, image.dtype, {rows, stride}, "(panel_rows, panel_stride)");
    expect_aligned(panel);
    const ContrastiveBackwardParams p{.pairs = pairs,
                                      .image_lse = image_lse.ptr<const float>(),
                                      .text_lse = text_lse.ptr<const float>(),
                                      .image_weight = image_weight,
                                      .text_weight = text_weight,
                                      .factor = factor.ptr<const float>(),
                                      .dimage = dimage.ptr<float>(),
                                      .dtext = dtext.ptr<float>(),
                                      .sums = sums.ptr<float>(),
                                      .panel = panel.data,
                                      .num_sums = int(num_sums),
                                      .panel_stride = stride};
    return is_half(image.dtype) &&
           run(
               image, [&](Stream stream) { return launch_contrastive_backward(p, stream); },
               nullptr);
}

static ContrastiveProducts products_of(const Tensor& products, const Tensor& scale,
                                       const Tensor& bias, int64_t first_positive) {
    expect_dtype(products, kFloats);
    const auto [num_rows, num_texts] = products.unpack<2>("(rows, batch)");
    expect_contiguous(products);
    expect_scalar(scale, products);
    expect_scalar(bias, products);
    return {.products = products.data,
            .logit_scale = scale.ptr<const float>(),
            .logit_bias = bias.ptr<const float>(),
            .num_rows = num_rows,
            .num_texts = num_texts,
            .first_positive = first_positive,
            .dtype = products.dtype};
}

static bool on_cpu(const Tensor& t) {
    return t.device.type == dlpack::kCPU && t.dtype != DType::kFloat64 && t.numel();
}

static bool clip_rows(py::handle products_, py::handle scale_, int64_t first_positive,
                      py::handle image_max_, py::handle image_log_, py::handle positive_,
                      py::handle text_max_, py::handle text_sum_) {
    const char* op = "clip_rows";
    Tensor products(op, "products", products_), scale(op, "logit_scale", scale_),
        image_max(op, "image_max", image_max_), image_log(op, "image_log", image_log_),
        positive(op, "positive", positive_, true), text_max(op, "text_max", text_max_),
        text_sum(op, "text_sum", text_sum_);
    const ContrastiveProducts x =
        products_of(products, scale, Tensor(op, "", py::none(), true), first_positive);
    if (!on_cpu(products)) return false;
    for (const Tensor* t : {&image_max, &image_log, &positive})
        expect_statistics(*t, products, DType::kFloat32, {x.num_rows}, "(rows,)");
    for (const Tensor* t : {&text_max, &text_sum})
        expect_statistics(*t, products, DType::kFloat32, {x.num_texts}, "(batch,)");
    ClipRowsParams p{.x = x,
                     .image_max = image_max.ptr<float>(),
                     .image_log = image_log.ptr<float>(),
                     .positive = positive.ptr<float>(),
                     .text_max = text_max.ptr<float>(),
                     .text_sum = text_sum.ptr<float>()};
    std::vector<float> workspace(2 * num_strips(x.num_texts) * x.num_rows);
    p.workspace = workspace.data();
    py::gil_scoped_release release;
    dispatch_isa([&]<class Isa>() { clip_rows_cpu<Isa>(p); });
    return true;
}

static bool siglip_rows(py::handle products_, py::handle scale_, py::handle bias_,
                        int64_t first_positive, py::handle losses_) {
    const char* op = "siglip_rows";
    Tensor products(op, "products", products_), scale(op, "logit_scale", scale_),
        bias(op, "logit_bias", bias_, true), losses(op, "losses", losses_);
    const ContrastiveProducts x = products_of(products, scale, bias, first_positive);
    if (!on_cpu(products)) return false;
    expect_statistics(losses, products, DType::kFloat32, {x.num_rows}, "(rows,)");
    const SiglipRowsParams p{.x = x, .losses = losses.ptr<float>()};
    py::gil_scoped_release release;
    dispatch_isa([&]<class Isa>() { siglip_rows_cpu<Isa>(p); });
    return true;
}

static bool contrastive_gradient_rows(py::handle products_, py::handle scale_, py::handle bias_,
                                      int64_t first_positive, py::handle image_lse_,
                                      py::handle text_lse_, float image_weight, float text_weight,
                                      py::handle sums_, py::handle factor_, py::handle ds_) {
    const char* op = "contrastive_gradient_rows";
    Tensor products(op, "products", products_), scale(op, "logit_scale", scale_),
        bias(op, "logit_bias", bias_, true), image_lse(op, "image_lse", image_lse_, true),
        text_lse(op, "text_lse", text_lse_, true), sums(op, "sums", sums_),
        factor(op, "factor", factor_), ds(op, "ds", ds_);
    const ContrastiveProducts x = products_of(products, scale, bias, first_positive);
    if (!on_cpu(products)) return false;
    expect_statistics(image_lse, products, DType::kFloat32, {2, x.num_rows}, "(2, rows)");
    expect_statistics(text_lse, products, DType::kFloat32, {2, x.num_texts}, "(2, batch)");
    expect_statistics(sums, products, DType::kFloat32, {2, x.num_rows}, "(2, rows)");
    expect_scalar(factor, products);
    expect_statistics(ds, products, x.dtype, {x.num_rows, x.num_texts}, "(rows, batch)");
    const ContrastiveGradientRowsParams p{.x = x,
                                          .ds = ds.data,
                                          .factor = factor.ptr<const float>(),
                                          .image_lse = image_lse.ptr<const float>(),
                                          .text_lse = text_lse.ptr<const float>(),
                                          .image_weight = image_weight,
                                          .text_weight = text_weight,
                                          .sums = sums.ptr<float>()};
    py::gil_scoped_release release;
    dispatch_isa([&]<class Isa>() { contrastive_gradient_rows_cpu<Isa>(p); });
    return true;
}

static const Binding binding([](py::module_& m) {
    m.def("contrastive_forward", &contrastive_forward);
    m.def("contrastive_backward", &contrastive_backward);
    m.def("contrastive_workspace", &contrastive_workspace);
    m.def("contrastive_num_sums", &contrastive_num_sums);
    m.def("clip_rows", &clip_rows);
    m.def("siglip_rows", &siglip_rows);
    m.def("contrastive_gradient_rows", &contrastive_gradient_rows);
});

}  // namespace vlmkernels
