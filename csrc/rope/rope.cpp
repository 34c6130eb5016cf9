#include "rope/rope.h"

#include <string>

#include "binding/check.h"
#include "binding/device.h"
#include "binding/rotation.h"
#include "common/isa.h"

namespace vlmkernels {

static RopeHeads heads_of(const Tensor& x, const Tensor& out) {
    return {.in = x.data,
            .out = out.data,
            .num_heads = int(x.size(-2)),
            .in_strides = head_strides(x),
            .out_strides = head_strides(out)};
}

// Checks the heads and fills all but the rotation.
static RopeParams params_of(const Tensor& q, const Tensor& k, const Tensor& q_out,
                            const Tensor& k_out) {
    expect_heads(q, k);
    expect_output_heads(q_out, q);
    expect_output_heads(k_out, k);
    expect_disjoint(q_out, k_out);
    return {.q = heads_of(q, q_out),
            .k = heads_of(k, k_out),
            .dtype = q.dtype,
            .num_tokens = int(num_tokens_of(q)),
            .head_dim = int(q.size(-1))};
}

static bool launch(const Tensor& q, const RopeParams& p) {
    if (q.dtype == DType::kFloat64) return false;
    return run(
        q, [&](Stream stream) { return launch_rope(p, stream); },
        [&] { dispatch_isa([&]<class Isa>() { rope_cpu<Isa>(p); }); });
}

static bool rope(py::handle q_, py::handle k_, py::handle position_ids_, py::handle q_out_,
                 py::handle k_out_, py::handle inv_freq_, py::handle axis_, int num_axes,
                 bool inverse) {
    Tensor q("rope", "q", q_), k("rope", "k", k_),
        position_ids("rope", "position_ids", position_ids_), q_out("rope", "q_out", q_out_),
        k_out("rope", "k_out", k_out_), inv_freq("rope", "inv_freq", inv_freq_),
        axis("rope", "axis", axis_);
    RopeParams p = params_of(q, k, q_out, k_out);
    p.rotation = rotation_of_positions(q, position_ids, inv_freq, axis, num_axes, inverse);
    return launch(q, p);
}

static bool rope_from_tables(py::handle q_, py::handle k_, py::handle cos_, py::handle sin_,
                             py::handle q_out_, py::handle k_out_, int64_t rotary_dim,
                             bool inverse) {
    const char* op = "rope_from_tables";
    Tensor q(op, "q", q_), k(op, "k", k_), cos(op, "cos", cos_), sin(op, "sin", sin_),
        q_out(op, "q_out", q_out_), k_out(op, "k_out", k_out_);
    RopeParams p = params_of(q, k, q_out, k_out);
    p.rotation = rotation_of_tables(q, cos, sin, rotary_dim, inverse);
    return launch(q, p);
}

// q, k or v of a fused projection (..., 3, num_heads, head_dim), without the cost of a torch view.
class Part : public Tensor {
  public:
    Part(const Tensor& qkv, int which) : Tensor(qkv) {
        ndim = qkv.ndim - 1;
        for (int i = 0, j = 0; i < qkv.ndim; ++i) {
            if (i == qkv.ndim - 3) continue;
            sizes_[j] = qkv.size(i);
            strides_[j++] = qkv.stride(i);
        }
        sizes = sizes_;
        strides = strides_;
        data = static_cast<char*>(data) + which * qkv.stride(-3) * size_of(dtype);
    }
    Part(const Part&) = delete;

  private:
    int64_t sizes_[4], strides_[4];
};

static void expect_qkv(const Tensor& qkv) {
    expect_dtype(qkv, kFloats);
    if ((qkv.ndim != 4 && qkv.ndim != 5) || qkv.size(-3) != 3)
        value_error(qkv,
                    "must have shape (num_tokens, 3, num_heads, head_dim) or "
                    "(batch, seqlen, 3, num_heads, head_dim)",
                    shape_text(qkv));
    expect_last_dim_contiguous(qkv);
}

// Rotates q and k of qkv into q_out and k_out; in place where these are None.
static bool rope_qkv(py::handle qkv_, py::handle position_ids_, py::handle q_out_,
                     py::handle k_out_, py::handle inv_freq_, py::handle axis_, int num_axes) {
    const char* op = "rope_qkv";
    Tensor qkv(op, "qkv", qkv_), position_ids(op, "position_ids", position_ids_),
        q_out(op, "q_out", q_out_, true), k_out(op, "k_out", k_out_, true),
        inv_freq(op, "inv_freq", inv_freq_), axis(op, "axis", axis_);
    expect_qkv(qkv);
    const Part q(qkv, 0), k(qkv, 1);
    if (!q_out.given) expect_no_overlap(qkv);
    const bool inplace = !q_out.given;
    RopeParams p = inplace ? params_of(q, k, q, k) : params_of(q, k, q_out, k_out);
    p.rotation = rotation_of_positions(q, position_ids, inv_freq, axis, num_axes, false);
    return launch(qkv, p);
}

// dqkv = (rotated back dq, rotated back dk, dv); dqkv is contiguous.
static bool rope_qkv_backward(py::handle dq_, py::handle dk_, py::handle dv_, py::handle dqkv_,
                              py::handle position_ids_, py::handle inv_freq_, py::handle axis_,
                              int num_axes) {
    const char* op = "rope_qkv_backward";
    Tensor dq(op, "dq", dq_), dk(op, "dk", dk_), dv(op, "dv", dv_), dqkv(op, "dqkv", dqkv_),
        position_ids(op, "position_ids", position_ids_), inv_freq(op, "inv_freq", inv_freq_),
        axis(op, "axis", axis_);
    expect_qkv(dqkv);
    expect_contiguous(dqkv);
    const Part q_out(dqkv, 0), k_out(dqkv, 1), v_out(dqkv, 2);
    RopeParams p = params_of(dq, dk, q_out, k_out);
    expect_same_shape(dv, dq);
    expect_same_dtype(dv, dq);
    expect_same_device(dv, dq);
    expect_last_dim_contiguous(dv);
    p.v = heads_of(dv, v_out);
    p.rotation = rotation_of_positions(dq, position_ids, inv_freq, axis, num_axes, true);
    return launch(dq, p);
}

static const Binding binding([](py::module_& m) {
    m.def("rope", &rope);
    m.def("rope_from_tables", &rope_from_tables);
    m.def("rope_qkv", &rope_qkv);
    m.def("rope_qkv_backward", &rope_qkv_backward);
});

}  // namespace vlmkernels
