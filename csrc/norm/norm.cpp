#include "norm/norm.h"

#include <algorithm>
#include <string>

#include "binding/check.h"
#include "binding/device.h"
#include "common/isa.h"

namespace vlmkernels {

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

static void check_output(const Tensor& t, const Tensor& like) {
    check_like(t, like);
    if (t.given) expect_contiguous(t);
}

// stats is (1 or 2, leading dimensions of x): rstd, and mean when centered.
static void check_stats(const Tensor& stats, const Tensor& x) {
    expect_dtype(stats, {x.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32});
    expect_same_device(stats, x);
    bool fits = stats.ndim == x.ndim && (stats.size(0) == 1 || stats.size(0) == 2);
    for (int i = 1; fits && i < x.ndim; ++i) fits = stats.size(i) == x.size(i - 1);
    if (!fits)
        value_error(stats,
                    "must have shape (1 or 2, ...) for " + std::string(x.name) + " (..., " +
                        std::to_string(x.size(-1)) + ") = " + shape_text(x),
                    shape_text(stats));
    expect_contiguous(stats);
}

static bool has_kernel(const Tensor& x) {
    return x.dtype != DType::kFloat64 && !(takes_cuda(x) && x.size(-1) > kMaxHiddenDimCuda);
}

// y, h and stats (rstd, and mean when centered: LayerNorm; None: not wanted) come from ops/norm.py.
static bool norm(py::handle x_, py::handle residual_, py::handle weight_, py::handle bias_,
                 py::handle y_, py::handle h_, py::handle stats_, double eps, bool centered) {
    const char* op = centered ? "layer_norm" : "rms_norm";
    Tensor x(op, "x", x_), residual(op, "residual", residual_, true), weight(op, "weight", weight_),
        bias(op, "bias", bias_, true), y(op, "y", y_), h(op, "h", h_, true),
        stats(op, "stats", stats_, true);
    check_x(x);
    check_like(residual, x);
    check_weight(weight, x);
    check_weight(bias, x);
    if (bias.given) expect_same_dtype(bias, weight);
    if (!(eps >= 0)) value_error(op, "eps must not be negative, got " + std::to_string(eps));
    check_output(y, x);
    check_output(h, x);
    if (h.given != residual.given) value_error(op, "h and residual go together");
    if (stats.given) {
        check_stats(stats, x);
        if ((stats.size(0) == 2) != centered)
            value_error(stats, "must fit the norm", shape_text(stats));
    }
    NormParams p{.x = x.data,
                 .residual = residual.data,
                 .weight = weight.data,
                 .bias = bias.data,
                 .y = y.data,
                 .h = h.data,
                 .mean = stats.given && centered ? stats.ptr<float>() + rows_of(x) : nullptr,
                 .rstd = stats.ptr<float>(),
                 .centered = centered,
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

// partials is (how many of dweight and dbias are given, num_partials, hidden_dim).
static void check_partials(const Tensor& partials, const Tensor& h, int64_t wanted,
                           int64_t num_partials) {
    if (partials.given != (wanted > 0)) value_error(h.op, "gradients and partials go together");
    if (!partials.given) return;
    expect_shape(partials, {wanted, num_partials, h.size(-1)},
                 "(gradients, num_partials, hidden_dim)");
    expect_dtype(partials, {DType::kFloat32});
    expect_same_device(partials, h);
    expect_contiguous(partials);
}

static bool norm_backward(py::handle dy_, py::handle dh_, py::handle h_, py::handle weight_,
                          py::handle stats_, py::handle dx_, py::handle dweight_, py::handle dbias_,
                          py::handle partials_) {
    const char* op = "norm_backward";
    Tensor dy(op, "dy", dy_), dh(op, "dh", dh_, true), h(op, "h", h_),
        weight(op, "weight", weight_), stats(op, "stats", stats_), dx(op, "dx", dx_),
        dweight(op, "dweight", dweight_, true), dbias(op, "dbias", dbias_, true),
        partials(op, "partials", partials_, true);
    check_x(h);
    check_weight(weight, h);
    for (const Tensor* t : {&dy, &dh, &dx}) check_output(*t, h);
    check_stats(stats, h);
    const int64_t num_partials = norm_num_partials(h_);
    check_output(dweight, weight);
    check_output(dbias, weight);
    check_partials(partials, h, dweight.given + dbias.given, num_partials);
    float* const dweight_partials = dweight.given ? partials.ptr<float>() : nullptr;
    float* const dbias_partials =
        !dbias.given ? nullptr
                     : partials.ptr<float>() + (dweight.given ? num_partials * h.size(-1) : 0);
    if (!has_kernel(h)) return false;
    const int64_t num_rows = rows_of(h);
    const bool centered = stats.size(0) == 2;
    NormBackwardParams p{.dy = dy.data,
                         .dh = dh.data,
                         .h = h.data,
                         .weight = weight.data,
                         .mean = centered ? stats.ptr<const float>() + num_rows : nullptr,
                         .rstd = stats.ptr<const float>(),
                         .dx = dx.data,
                         .dweight = dweight.data,
                         .dbias = dbias.data,
                         .dweight_partials = dweight_partials,
                         .dbias_partials = dbias_partials,
                         .num_partials = int(num_partials),
                         .num_rows = num_rows,
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
