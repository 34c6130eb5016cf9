#include "rope/rope.h"

#include <string>

#include "binding/check.h"
#include "binding/device.h"
#include "common/isa.h"

namespace vlmkernels {

// Strides of the leading dimensions (batch,) token [, head] of a dense or packed tensor.
static RopeStrides strides_of(const Tensor& t, bool dense) {
    auto stride = [&](int dim) { return dim < t.ndim ? t.stride(dim) : 0; };
    return dense ? RopeStrides{t.size(0) > 1 ? t.stride(0) : 0, stride(1), stride(2)}
                 : RopeStrides{0, stride(0), stride(1)};
}

// Each dimension must step over all that those of smaller stride span.
static void expect_no_overlap(const Tensor& out) {
    if (!out.numel()) return;
    int64_t extent = 0;  // offset of the last element, over the dimensions seen
    bool seen[4] = {};
    for (int n = 0; n < out.ndim; ++n) {
        int next = -1;
        for (int i = 0; i < out.ndim; ++i)
            if (!seen[i] && (next < 0 || out.strides[i] < out.strides[next])) next = i;
        seen[next] = true;
        if (out.sizes[next] == 1) continue;
        if (out.strides[next] <= extent)
            value_error(out, "must not overlap itself to be written in place",
                        "a stride of " + std::to_string(out.strides[next]));
        extent += (out.sizes[next] - 1) * out.strides[next];
    }
}

static void check_heads(const Tensor& x, const Tensor& out) {
    expect_dtype(x, kFloats);
    expect_last_dim_contiguous(x);
    expect_same_shape(out, x);
    expect_same_dtype(out, x);
    expect_same_device(out, x);
    expect_last_dim_contiguous(out);
    expect_no_overlap(out);
}

static RopeHeads heads_of(const Tensor& x, const Tensor& out, bool dense) {
    return {.in = x.data,
            .out = out.data,
            .num_heads = int(x.size(-2)),
            .in_strides = strides_of(x, dense),
            .out_strides = strides_of(out, dense)};
}

// Checks q and k against each other and fills what both variants share.
static RopeParams params_of(const Tensor& q, const Tensor& k, const Tensor& q_out,
                            const Tensor& k_out, int64_t num_pairs, bool inverse) {
    const bool dense = q.ndim == 4;
    if (!dense)
        q.unpack<3>("(num_tokens, num_heads, head_dim) or (batch, seqlen, num_heads, head_dim)");
    bool same = k.ndim == q.ndim && k.size(-1) == q.size(-1);
    for (int i = 0; same && i < q.ndim - 2; ++i) same = k.size(i) == q.size(i);
    if (!same)
        value_error(k, "must have the shape of q " + shape_text(q) + " but for num_heads",
                    shape_text(k));
    expect_same_dtype(k, q);
    expect_same_device(k, q);
    check_heads(q, q_out);
    check_heads(k, k_out);
    if (q_out.data == k_out.data && q_out.numel() && k_out.numel())
        value_error(q.op, "q and k must not share their memory to be written in place");
    const int64_t head_dim = q.size(-1), seqlen = q.size(dense ? 1 : 0);
    const int64_t num_tokens = dense ? q.size(0) * seqlen : seqlen;
    if (num_pairs < 1 || 2 * num_pairs > head_dim || num_pairs > kMaxPairs)
        value_error(q.op, "rotary_dim must be even, at most 256 and at most head_dim (" +
                              std::to_string(head_dim) + "), got " + std::to_string(2 * num_pairs));
    if (num_tokens > INT32_MAX) value_error(q, "must have fewer than 2^31 tokens", shape_text(q));
    RopeParams p{};
    p.q = heads_of(q, q_out, dense);
    p.k = heads_of(k, k_out, dense);
    p.dtype = q.dtype;
    p.num_tokens = int(num_tokens);
    p.seqlen = int(seqlen);
    p.head_dim = int(head_dim);
    p.num_pairs = int(num_pairs);
    p.inverse = inverse;
    return p;
}

// Expects t to be (leading..., the token dimensions of q, last...); a batch of 1 serves all rows.
static void expect_tokens(const Tensor& t, const Tensor& q, int64_t leading, int64_t last) {
    const int tokens = q.ndim - 2, first = leading ? 1 : 0;
    bool fits = t.ndim == first + tokens + (last ? 1 : 0) && (!leading || t.size(0) == leading);
    for (int i = 0; fits && i < tokens; ++i)
        fits = t.size(first + i) == q.size(i) || (tokens == 2 && i == 0 && t.size(first) == 1);
    if (fits) return;
    std::string text = leading ? std::to_string(leading) + ", " : "";
    for (int i = 0; i < tokens; ++i) text += (i ? ", " : "") + std::to_string(q.size(i));
    if (last) text += ", rotary_dim or rotary_dim/2";
    if (!leading && !last && tokens == 1) text += ",";
    value_error(t, "must have shape (" + text + ") for q " + shape_text(q), shape_text(t));
}

static bool launch(const Tensor& q, const RopeParams& p) {
    if (q.dtype == DType::kFloat64) return false;
    return run(
        q, [&](Stream stream) { return launch_rope(p, stream); },
        [&] { dispatch_isa([&]<class Isa>() { rope_cpu<Isa>(p); }); });
}

// inv_freq float32 and axis int64, both (num_pairs,) and on the CPU, come from ops/rope.py.
static bool rope(py::handle q_, py::handle k_, py::handle position_ids_, py::handle q_out_,
                 py::handle k_out_, py::handle inv_freq_, py::handle axis_, int num_axes,
                 bool inverse) {
    Tensor q("rope", "q", q_), k("rope", "k", k_),
        position_ids("rope", "position_ids", position_ids_), q_out("rope", "q_out", q_out_),
        k_out("rope", "k_out", k_out_), inv_freq("rope", "inv_freq", inv_freq_),
        axis("rope", "axis", axis_);
    RopeParams p = params_of(q, k, q_out, k_out, inv_freq.numel(), inverse);
    if (num_axes < 1 || num_axes > 3)
        value_error("rope", "there must be 1 to 3 sections, got " + std::to_string(num_axes));
    expect_shape(axis, {inv_freq.numel()}, "(num_pairs,)");
    expect_dtype(position_ids, kInts);
    expect_same_device(position_ids, q);
    expect_tokens(position_ids, q, num_axes > 1 ? num_axes : 0, 0);
    const int first = num_axes > 1 ? 1 : 0;
    const bool dense = q.ndim == 4;
    p.position_ids = position_ids.data;
    p.num_axes = num_axes;
    p.position_dtype = position_ids.dtype;
    p.position_axis_stride = first ? position_ids.stride(0) : 0;
    p.position_batch_stride =
        dense && position_ids.size(first) > 1 ? position_ids.stride(first) : 0;
    p.position_token_stride = position_ids.stride(-1);
    for (int i = 0; i < p.num_pairs; ++i) {
        p.inv_freq[i] = inv_freq.ptr<const float>()[i];
        const int64_t of_pair = axis.ptr<const int64_t>()[i];
        if (of_pair < 0 || of_pair >= num_axes)
            value_error(axis, "must be below " + std::to_string(num_axes), std::to_string(of_pair));
        p.axis[i] = uint8_t(of_pair);
    }
    return launch(q, p);
}

static bool rope_from_tables(py::handle q_, py::handle k_, py::handle cos_, py::handle sin_,
                             py::handle q_out_, py::handle k_out_, int64_t rotary_dim,
                             bool inverse) {
    const char* op = "rope_from_tables";
    Tensor q(op, "q", q_), k(op, "k", k_), cos(op, "cos", cos_), sin(op, "sin", sin_),
        q_out(op, "q_out", q_out_), k_out(op, "k_out", k_out_);
    if (rotary_dim % 2)
        value_error(op, "rotary_dim must be even, got " + std::to_string(rotary_dim));
    RopeParams p = params_of(q, k, q_out, k_out, rotary_dim / 2, inverse);
    for (const Tensor* table : {&cos, &sin}) {
        expect_dtype(*table, {DType::kFloat32, q.dtype});
        expect_same_device(*table, q);
        expect_tokens(*table, q, 0, 1);
        expect_last_dim_contiguous(*table);
        if (table->size(-1) != rotary_dim && table->size(-1) != rotary_dim / 2)
            value_error(*table,
                        "must be rotary_dim = " + std::to_string(rotary_dim) +
                            " or rotary_dim/2 wide (give rotary_dim for a partial rotation)",
                        shape_text(*table));
    }
    expect_same_dtype(sin, cos);
    p.cos = cos.data;
    p.sin = sin.data;
    p.table_dtype = cos.dtype;
    p.cos_strides = strides_of(cos, q.ndim == 4);
    p.sin_strides = strides_of(sin, q.ndim == 4);
    return launch(q, p);
}

static const Binding binding([](py::module_& m) {
    m.def("rope", &rope);
    m.def("rope_from_tables", &rope_from_tables);
});

}  // namespace vlmkernels
