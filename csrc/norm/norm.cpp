#include "norm/norm.h"

#include <algorithm>
#include <string>

#include "binding/check.h"
#include "binding/device.h"
#include "common/isa.h"

namespace vlmkernels {

// Elements from one row of t to the next, when all leading dimensions share one such stride.
static int64_t row_stride(const Tensor& t) {
    expect_last_dim_contiguous(t);
    int64_t stride = 0, expected = 0;
    for (int i = t.ndim - 2; i >= 0; --i) {
        if (t.size(i) == 0) return 0;
        if (t.size(i) == 1) continue;
        if (!expected) stride = expected = t.stride(i);
        if (t.stride(i) != expected)
            value_error(t, "must have rows at one stride", "other strides (call .contiguous())");
        expected *= t.size(i);
    }
    return stride;
}

static int64_t rows_of(const Tensor& t) { return t.size(-1) ? t.numel() / t.size(-1) : 0; }

static void check_x(const Tensor& x) {
    expect_dtype(x, kFloats);
    if (x.ndim < 1 || x.size(-1) < 1 || x.size(-1) > INT32_MAX)
        value_error(x, "must have shape (..., hidden_dim) with hidden_dim >= 1", shape_text(x));
}

static void check_like(const Tensor& t, const Tensor& x) {
    if (!t.given) return;
    expect_same_shape(t, x);
    expect_same_dtype(t, x);
    expect_same_device(t, x);
}

static void check_weight(const Tensor& weight, const Tensor& x) {
    if (!weight.given) return;
    expect_shape(weight, {x.size(-1)}, "(hidden_dim,)");
    expect_dtype(weight, {x.dtype, DType::kFloat32});
    expect_same_device(weight, x);
    expect_contiguous(weight);
}

static bool has_kernel(const Tensor& x) {
    return x.dtype != DType::kFloat64 && !(takes_cuda(x) && x.size(-1) > kMaxHiddenDimCuda);
}

// y, h and stats (rstd, and mean when centered: LayerNorm) come from ops/norm.py.
static bool norm(py::handle x_, py::handle residual_, py::handle weight_, py::handle bias_,
                 py::handle y_, py::handle h_, py::handle stats_, double eps, bool centered) {
    const char* op = centered ? "layer_norm" : "rms_norm";
    Tensor x(op, "x", x_), residual(op, "residual", residual_, true), weight(op, "weight", weight_),
        bias(op, "bias", bias_, true), y(op, "y", y_), h(op, "h", h_, true),
        stats(op, "stats", stats_);
    check_x(x);
    check_like(residual, x);
    check_weight(weight, x);
    check_weight(bias, x);
    if (bias.given) expect_same_dtype(bias, weight);
    if (!(eps >= 0)) value_error(op, "eps must not be negative, got " + std::to_string(eps));
    NormParams p{.x = x.data,
                 .residual = residual.data,
                 .weight = weight.data,
                 .bias = bias.data,
                 .y = y.data,
                 .h = h.data,
                 .mean = centered ? stats.ptr<float>() + rows_of(x) : nullptr,
                 .rstd = stats.ptr<float>(),
                 .num_rows = rows_of(x),
                 .hidden_dim = int(x.size(-1)),
                 .x_stride = row_stride(x),
                 .residual_stride = residual.given ? row_stride(residual) : 0,
                 .eps = float(eps),
                 .dtype = x.dtype,
                 .weight_dtype = weight.dtype};
    if (!has_kernel(x)) return false;
    return run(
        x, [&](Stream stream) { return launch_norm(p, stream); },
        [&] { dispatch_isa([&]<class Isa>() { norm_cpu<Isa>(p); }); });
}

// How many partial sums of the weight gradients a backward takes. CUDA: one per CTA, two CTAs for
// each SM of an H100; CPU: enough for the threads, with at least 32 rows each.
static int64_t norm_num_partials(py::handle h_) {
    Tensor h("norm_backward", "h", h_);
    const int64_t rows = rows_of(h);
    return std::max<int64_t>(
        1, takes_cuda(h) ? std::min<int64_t>(rows, 264) : std::min<int64_t>((rows + 31) / 32, 64));
}

static bool norm_backward(py::handle dy_, py::handle dh_, py::handle h_, py::handle weight_,
                          py::handle stats_, py::handle dx_, py::handle dweight_, py::handle dbias_,
                          py::handle dweight_partials_, py::handle dbias_partials_) {
    const char* op = "norm_backward";
    Tensor dy(op, "dy", dy_), dh(op, "dh", dh_, true), h(op, "h", h_),
        weight(op, "weight", weight_), stats(op, "stats", stats_), dx(op, "dx", dx_),
        dweight(op, "dweight", dweight_, true), dbias(op, "dbias", dbias_, true),
        dweight_partials(op, "dweight_partials", dweight_partials_, true),
        dbias_partials(op, "dbias_partials", dbias_partials_, true);
    check_x(h);
    check_weight(weight, h);
    for (const Tensor* t : {&dy, &dh}) {
        check_like(*t, h);
        if (t->given) expect_contiguous(*t);
    }
    if (!has_kernel(h)) return false;
    expect_dtype(stats, {DType::kFloat32});
    expect_contiguous(stats);
    const int64_t num_rows = rows_of(h);
    const bool centered = stats.size(0) == 2;
    const Tensor& partials = dweight.given ? dweight_partials : dbias_partials;
    NormBackwardParams p{
        .dy = dy.data,
        .dh = dh.data,
        .h = h.data,
        .weight = weight.data,
        .mean = centered ? stats.ptr<const float>() + num_rows : nullptr,
        .rstd = stats.ptr<const float>(),
        .dx = dx.data,
        .dweight = dweight.data,
        .dbias = dbias.data,
        .dweight_partials = dweight_partials.ptr<float>(),
        .dbias_partials = dbias_partials.ptr<float>(),
        .num_partials = int(partials.given ? partials.size(0) : norm_num_partials(h_)),
        .num_rows = rows_of(h),
        .hidden_dim = int(h.size(-1)),
        .h_stride = row_stride(h),
        .dtype = h.dtype,
        .weight_dtype = weight.dtype};
    return run(
        h, [&](Stream stream) { return launch_norm_backward(p, stream); },
        [&] { dispatch_isa([&]<class Isa>() { norm_backward_cpu<Isa>(p); }); });
}

static const Binding binding([](py::module_& m) {
    m.def("norm", &norm);
    m.def("norm_backward", &norm_backward);
    m.def("norm_num_partials", &norm_num_partials);
});

}  // namespace vlmkernels
