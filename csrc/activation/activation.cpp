#include "activation/activation.h"

#include <string>

#include "binding/check.h"
#include "binding/device.h"
#include "common/isa.h"

namespace vlmkernels {

static Activation activation_of(const char* op, const std::string& kind) {
    if (kind == "silu") return Activation::kSilu;
    if (kind == "quick_gelu") return Activation::kQuickGelu;
    if (kind == "gelu") return Activation::kGelu;
    if (kind == "gelu_tanh") return Activation::kGeluTanh;
    value_error(op, "kind must be silu, quick_gelu, gelu or gelu_tanh, got '" + kind + "'");
}

// Rows that lie one behind the other become one row.
template <class Params>
static void join_rows(Params& p, bool dense) {
    if (!dense) return;
    p.dim *= p.num_rows;
    p.num_rows = 1;
}

static void check_like(const Tensor& t, const Tensor& x) {
    expect_same_shape(t, x);
    expect_same_dtype(t, x);
    expect_same_device(t, x);
    expect_contiguous(t);
}

// What a gated activation takes and gives: two tensors (..., dim), or one (..., 2 dim).
struct Halves {
    void *gate, *up;
    int64_t gate_stride, up_stride, num_rows, dim;
    bool dense;

    Halves(const Tensor& gate_, const Tensor& up_) {
        expect_dtype(gate_, kFloats);
        if (gate_.ndim < 1) value_error(gate_, "must have shape (..., dim)", shape_text(gate_));
        const int64_t width = gate_.size(-1);
        gate = gate_.data;
        gate_stride = row_stride(gate_);
        num_rows = width ? gate_.numel() / width : 0;
        if (up_.given) {
            expect_same_shape(up_, gate_);
            expect_same_dtype(up_, gate_);
            expect_same_device(up_, gate_);
            up = up_.data;
            up_stride = row_stride(up_);
            dim = width;
        } else {
            if (width % 2)
                value_error(gate_, "must have shape (..., 2 * dim), gate and up side by side",
                            shape_text(gate_));
            dim = width / 2;
            up = static_cast<char*>(gate) + dim * size_of(gate_.dtype);
            up_stride = gate_stride;
        }
        dense = up_.given && gate_stride == dim && up_stride == dim;
    }
};

// y is (..., dim), contiguous.
static void check_product(const Tensor& y, const Tensor& gate, int64_t dim) {
    bool fits = y.ndim == gate.ndim && y.size(-1) == dim;
    for (int i = 0; fits && i < y.ndim - 1; ++i) fits = y.size(i) == gate.size(i);
    if (!fits)
        value_error(y, "must have the shape of gate but for dim = " + std::to_string(dim),
                    shape_text(y));
    expect_same_dtype(y, gate);
    expect_same_device(y, gate);
    expect_contiguous(y);
}

static bool launch(const Tensor& t, const ActivationParams& p) {
    if (p.dtype == DType::kFloat64) return false;
    return run(
        t, [&](Stream stream) { return launch_activation(p, stream); },
        [&] { dispatch_isa([&]<class Isa>() { activation_cpu<Isa>(p); }); });
}

static bool launch_backward(const Tensor& t, const ActivationBackwardParams& p) {
    if (p.dtype == DType::kFloat64) return false;
    return run(
        t, [&](Stream stream) { return launch_activation_backward(p, stream); },
        [&] { dispatch_isa([&]<class Isa>() { activation_backward_cpu<Isa>(p); }); });
}

static bool activation(py::handle x_, py::handle y_, const std::string& kind) {
    Tensor x(kind.c_str(), "x", x_), y(kind.c_str(), "y", y_);
    const Activation which = activation_of("activation", kind);
    expect_dtype(x, kFloats);
    expect_contiguous(x);
    check_like(y, x);
    return launch(x, {.x = x.data,
                      .y = y.data,
                      .num_rows = 1,
                      .dim = x.numel(),
                      .dtype = x.dtype,
                      .kind = which});
}

static bool activation_backward(py::handle dy_, py::handle x_, py::handle dx_,
                                const std::string& kind) {
    const char* op = "activation_backward";
    Tensor dy(op, "dy", dy_), x(op, "x", x_), dx(op, "dx", dx_);
    const Activation which = activation_of(op, kind);
    expect_dtype(x, kFloats);
    expect_contiguous(x);
    check_like(dy, x);
    check_like(dx, x);
    return launch_backward(x, {.dy = dy.data,
                               .x = x.data,
                               .dx = dx.data,
                               .num_rows = 1,
                               .dim = x.numel(),
                               .dtype = x.dtype,
                               .kind = which});
}

// up None: gate is (..., 2 dim) and holds both.
static bool gated_activation(py::handle gate_, py::handle up_, py::handle y_,
                             const std::string& kind) {
    const char* op = "gated_activation";
    Tensor gate(op, "gate", gate_), up(op, "up", up_, true), y(op, "y", y_);
    const Activation which = activation_of(op, kind);
    const Halves in(gate, up);
    check_product(y, gate, in.dim);
    ActivationParams p{.x = in.gate,
                       .up = in.up,
                       .y = y.data,
                       .num_rows = in.num_rows,
                       .dim = in.dim,
                       .x_stride = in.gate_stride,
                       .up_stride = in.up_stride,
                       .dtype = gate.dtype,
                       .kind = which};
    join_rows(p, in.dense);
    return launch(gate, p);
}

static bool gated_activation_backward(py::handle dy_, py::handle gate_, py::handle up_,
                                      py::handle dgate_, py::handle dup_, const std::string& kind) {
    const char* op = "gated_activation_backward";
    Tensor dy(op, "dy", dy_), gate(op, "gate", gate_), up(op, "up", up_, true),
        dgate(op, "dgate", dgate_), dup(op, "dup", dup_, true);
    const Activation which = activation_of(op, kind);
    const Halves in(gate, up);
    check_product(dy, gate, in.dim);
    check_like(dgate, gate);
    if (dup.given != up.given) value_error(op, "up and dup go together");
    if (dup.given) check_like(dup, up);
    const Halves out(dgate, dup);
    ActivationBackwardParams p{.dy = dy.data,
                               .x = in.gate,
                               .up = in.up,
                               .dx = out.gate,
                               .dup = out.up,
                               .num_rows = in.num_rows,
                               .dim = in.dim,
                               .x_stride = in.gate_stride,
                               .up_stride = in.up_stride,
                               .dx_stride = out.gate_stride,
                               .dup_stride = out.up_stride,
                               .dtype = gate.dtype,
                               .kind = which};
    join_rows(p, in.dense && out.dense);
    return launch_backward(gate, p);
}

static const Binding binding([](py::module_& m) {
    m.def("activation", &activation);
    m.def("activation_backward", &activation_backward);
    m.def("gated_activation", &gated_activation);
    m.def("gated_activation_backward", &gated_activation_backward);
});

}  // namespace vlmkernels
