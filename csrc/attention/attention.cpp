#include "attention/attention.h"

#include "attention/attention_check.h"
#include "binding/check.h"
#include "binding/device.h"
#include "common/isa.h"

namespace vlmkernels {

// The optional tensors as they come from Python, in the order of the op's schema.
struct MaskTensors {
    Tensor id_ranges, tile_order, bias, cu_q, cu_k, segments_q, segments_k, images_q, images_k,
        spans;

    MaskTensors(const char* op, const py::sequence& t)
        : id_ranges(op, "id_ranges", t[0], true),
          tile_order(op, "tile_order", t[1], true),
          bias(op, "bias", t[2], true),
          cu_q(op, "cu_seqlens_q", t[3], true),
          cu_k(op, "cu_seqlens_k", t[4], !cu_q.given),
          segments_q(op, "segment_ids[0]", t[5], true),
          segments_k(op, "segment_ids[1]", t[6], true),
          images_q(op, "image_ids[0]", t[7], true),
          images_k(op, "image_ids[1]", t[8], true),
          spans(op, "key_spans", t[9], true) {}
    Masks masks() const {
        return {bias,     cu_q,     cu_k,  segments_q, segments_k,
                images_q, images_k, spans, id_ranges,  tile_order};
    }
};

static bool attention(py::handle q_, py::handle k_, py::handle v_, py::handle out_, py::handle lse_,
                      const py::sequence& masks, int64_t max_seqlen_q, int64_t max_seqlen_k,
                      int64_t window_left, int64_t window_right, double softmax_scale,
                      double softcap) {
    const char* op = "attention";
    Tensor q(op, "q", q_), k(op, "k", k_), v(op, "v", v_), out(op, "out", out_);
    Tensor lse(op, "lse", lse_);
    const MaskTensors tensors(op, masks);
    AttentionParams p = check_inputs(
        q, k, v, tensors.masks(),
        {max_seqlen_q, max_seqlen_k, window_left, window_right, softmax_scale, softcap});
    set_lse(p, q, lse);
    expect_result(out, q);
    p.out = heads_view(out);
    p.float32_out = out.dtype != q.dtype;
    if (!has_kernel(q)) return false;
    return run(
        q, [&](Stream stream) { return launch_attention(p, stream); },
        [&] { dispatch_isa([&]<class Isa>() { attention_fwd_cpu<Isa>(p); }); });
}

// Either out and maybe dlse are given, or delta.
static void set_delta(AttentionBackwardParams& p, const Tensor& q, const Tensor& out,
                      const Tensor& dlse, const Tensor& given_delta) {
    if (given_delta.given) {
        expect_lse(given_delta, q);
        p.given_delta = given_delta.ptr<float>();
        return;
    }
    expect_same_shape(out, q);
    expect_heads_like(out, q);
    p.out = heads_view(out);
    if (dlse.given) expect_lse(dlse, q);
    p.dlse = dlse.ptr<float>();
}

static bool attention_backward(py::handle dout_, py::handle dlse_, py::handle q_, py::handle k_,
                               py::handle v_, py::handle out_, py::handle lse_,
                               py::handle given_delta_, py::handle delta_, py::handle dq_,
                               py::handle dk_, py::handle dv_, py::handle dbias_,
                               const py::sequence& masks, int64_t max_seqlen_q,
                               int64_t max_seqlen_k, int64_t window_left, int64_t window_right,
                               double softmax_scale, double softcap) {
    const char* op = "attention_backward";
    Tensor dout(op, "dout", dout_), dlse(op, "dlse", dlse_, true);
    Tensor q(op, "q", q_), k(op, "k", k_), v(op, "v", v_), lse(op, "lse", lse_);
    Tensor given_delta(op, "delta", given_delta_, true), out(op, "out", out_, given_delta.given);
    Tensor delta(op, "workspace", delta_), dq(op, "dq", dq_), dk(op, "dk", dk_), dv(op, "dv", dv_);
    Tensor dbias(op, "dbias", dbias_, true);
    const MaskTensors tensors(op, masks);
    AttentionBackwardParams p{check_inputs(
        q, k, v, tensors.masks(),
        {max_seqlen_q, max_seqlen_k, window_left, window_right, softmax_scale, softcap})};
    set_lse(p, q, lse);
    set_delta(p, q, out, dlse, given_delta);
    expect_same_shape(dout, q);
    expect_heads_like(dout, q);
    expect_result(dq, q);
    expect_result(dk, k);
    expect_result(dv, k);
    for (const Tensor* t : {&dk, &dv}) expect_same_dtype(*t, dq);
    expect_delta(delta, lse);
    p.dout = heads_view(dout);
    p.delta = delta.ptr<float>();
    p.dq = heads_view(dq);
    p.dk = heads_view(dk);
    p.dv = heads_view(dv);
    p.float32_out = dq.dtype != q.dtype;
    if (dbias.given) {
        expect_same_shape(dbias, tensors.bias);
        expect_same_dtype(dbias, tensors.bias);
        expect_contiguous(dbias);
        p.dbias = check_bias(dbias, q, p);
    }
    if (!has_kernel(q)) return false;
    return run(
        q, [&](Stream stream) { return launch_attention_backward(p, stream); },
        [&] { dispatch_isa([&]<class Isa>() { attention_bwd_cpu<Isa>(p); }); });
}

static const Binding binding([](py::module_& m) {
    m.def("attention", &attention);
    m.def("attention_backward", &attention_backward);
});

}  // namespace vlmkernels
