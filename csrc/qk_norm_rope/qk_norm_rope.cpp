#include "qk_norm_rope/qk_norm_rope.h"

#include <algorithm>
#include <string>

#include "binding/check.h"
#include "binding/device.h"
#include "binding/rotation.h"
#include "common/isa.h"

namespace vlmkernels {

static NormedHeads heads_of(const Tensor& x, const Tensor& dy, const Tensor& out,
                            const Tensor& weight) {
    expect_shape(weight, {x.size(-1)}, "(head_dim,)");
    expect_dtype(weight, {x.dtype, DType::kFloat32});
    expect_same_device(weight, x);
    expect_contiguous(weight);
    expect_output_heads(out, x);
    return {.x = x.data,
            .dy = dy.data,
            .out = out.data,
            .weight = weight.data,
            .num_heads = int(x.size(-2)),
            .x_strides = head_strides(x),
            .dy_strides = dy.given ? head_strides(dy) : HeadStrides{},
            .out_strides = head_strides(out),
            .by_heads = FastDivide(uint32_t(std::max<int64_t>(1, x.size(-2))))};
}

// What ops/qk_norm_rope.py gives for the angles: position_ids, inv_freq, axis, num_axes, or None
// three times, cos and sin.
struct AnglesOf {
    py::handle position_ids, inv_freq, axis;
    int num_axes;
    py::handle cos, sin;
    int64_t rotary_dim;
};

static Rotation rotation_of(const Tensor& q, const AnglesOf& from) {
    const char* op = q.op;
    if (from.position_ids.is_none())
        return rotation_of_tables(q, Tensor(op, "cos", from.cos), Tensor(op, "sin", from.sin),
                                  from.rotary_dim, false);
    return rotation_of_positions(q, Tensor(op, "position_ids", from.position_ids),
                                 Tensor(op, "inv_freq", from.inv_freq),
                                 Tensor(op, "axis", from.axis), from.num_axes, false);
}

static QkNormRopeParams params_of(const Tensor& q, const Tensor& k, const Tensor& q_weight,
                                  double eps) {
    if (!(eps >= 0)) value_error(q.op, "eps must not be negative, got " + std::to_string(eps));
    return {.dtype = q.dtype,
            .weight_dtype = q_weight.dtype,
            .num_tokens = int(num_tokens_of(q)),
            .head_dim = int(q.size(-1)),
            .eps = float(eps)};
}

static bool has_kernel(const Tensor& q) {
    return q.dtype != DType::kFloat64 && q.size(-1) <= kMaxNormedHeadDim && q.size(-1) % 2 == 0;
}

static bool qk_norm_rope(py::handle q_, py::handle k_, py::handle q_weight_, py::handle k_weight_,
                         py::handle q_out_, py::handle k_out_, double eps, py::handle position_ids,
                         py::handle inv_freq, py::handle axis, int num_axes, py::handle cos,
                         py::handle sin, int64_t rotary_dim) {
    const char* op = "qk_norm_rope";
    Tensor q(op, "q", q_), k(op, "k", k_), q_weight(op, "q_weight", q_weight_),
        k_weight(op, "k_weight", k_weight_), q_out(op, "q_out", q_out_), k_out(op, "k_out", k_out_),
        none(op, "dy", py::none(), true);
    expect_heads(q, k);
    QkNormRopeParams p = params_of(q, k, q_weight, eps);
    p.q = heads_of(q, none, q_out, q_weight);
    p.k = heads_of(k, none, k_out, k_weight);
    expect_same_dtype(k_weight, q_weight);
    p.rotation = rotation_of(q, {position_ids, inv_freq, axis, num_axes, cos, sin, rotary_dim});
    if (!has_kernel(q)) return false;
    return run(
        q, [&](Stream stream) { return launch_qk_norm_rope(p, stream); },
        [&] { dispatch_isa([&]<class Isa>() { qk_norm_rope_cpu<Isa>(p); }); });
}

// How many partial sums of the weight gradients a backward takes. CUDA: one per CTA, two CTAs for
// each SM of an H100; CPU: enough for the threads, with at least 32 tokens each.
static int64_t num_partials_of(const Tensor& q) {
    const int64_t tokens = num_tokens_of(q);
    return std::max<int64_t>(1, takes_cuda(q) ? std::min<int64_t>(tokens, 264)
                                              : std::min<int64_t>((tokens + 31) / 32, 64));
}

static int64_t qk_norm_rope_num_partials(py::handle q_) {
    Tensor q("qk_norm_rope_backward", "q", q_);
    if (q.ndim < 3) value_error(q, "must have 3 or 4 dimensions", shape_text(q));
    return num_partials_of(q);
}

// partials is (2, num_partials, head_dim), None: no weight gradients; then dq_weight and dk_weight
// are None, too.
static bool qk_norm_rope_backward(py::handle dy_q_, py::handle dy_k_, py::handle q_, py::handle k_,
                                  py::handle q_weight_, py::handle k_weight_, py::handle dq_,
                                  py::handle dk_, py::handle dq_weight_, py::handle dk_weight_,
                                  py::handle partials_, double eps, py::handle position_ids,
                                  py::handle inv_freq, py::handle axis, int num_axes,
                                  py::handle cos, py::handle sin, int64_t rotary_dim) {
    const char* op = "qk_norm_rope_backward";
    Tensor dy_q(op, "dq", dy_q_), dy_k(op, "dk", dy_k_), q(op, "q", q_), k(op, "k", k_),
        q_weight(op, "q_weight", q_weight_), k_weight(op, "k_weight", k_weight_),
        dq(op, "dq_out", dq_), dk(op, "dk_out", dk_), dq_weight(op, "dq_weight", dq_weight_, true),
        dk_weight(op, "dk_weight", dk_weight_, true), partials(op, "partials", partials_, true);
    expect_heads(q, k);
    expect_same_shape(dy_q, q);
    expect_same_shape(dy_k, k);
    for (const Tensor* dy : {&dy_q, &dy_k}) {
        expect_same_dtype(*dy, q);
        expect_same_device(*dy, q);
        expect_last_dim_contiguous(*dy);
    }
    QkNormRopeParams p = params_of(q, k, q_weight, eps);
    p.q = heads_of(q, dy_q, dq, q_weight);
    p.k = heads_of(k, dy_k, dk, k_weight);
    expect_same_dtype(k_weight, q_weight);
    p.num_partials = int(num_partials_of(q));
    for (const Tensor* dweight : {&dq_weight, &dk_weight}) {
        if (dweight->given != partials.given) value_error(op, "gradients and partials go together");
        if (!partials.given) continue;
        expect_same_shape(*dweight, q_weight);
        expect_same_dtype(*dweight, q_weight);
        expect_same_device(*dweight, q);
        expect_contiguous(*dweight);
    }
    if (partials.given) {
        expect_shape(partials, {2, p.num_partials, p.head_dim}, "(2, num_partials, head_dim)");
        expect_dtype(partials, {DType::kFloat32});
        expect_same_device(partials, q);
        expect_contiguous(partials);
        p.partials[0] = partials.ptr<float>();
        p.partials[1] = p.partials[0] + int64_t(p.num_partials) * p.head_dim;
    }
    p.rotation = rotation_of(q, {position_ids, inv_freq, axis, num_axes, cos, sin, rotary_dim});
    if (!has_kernel(q)) return false;
    const ColumnSums weights{.partials = {p.partials[0], p.partials[1]},
                             .sums = {dq_weight.data, dk_weight.data},
                             .num_partials = p.num_partials,
                             .num_columns = p.head_dim,
                             .dtype = q_weight.dtype};
    return run(
        q, [&](Stream stream) { return launch_qk_norm_rope_backward(p, weights, stream); },
        [&] { dispatch_isa([&]<class Isa>() { qk_norm_rope_backward_cpu<Isa>(p, weights); }); });
}

static const Binding binding([](py::module_& m) {
    m.def("qk_norm_rope", &qk_norm_rope);
    m.def("qk_norm_rope_backward", &qk_norm_rope_backward);
    m.def("qk_norm_rope_num_partials", &qk_norm_rope_num_partials);
});

}  // namespace vlmkernels
