#include "qformer_attention/qformer_attention.h"

#include <cmath>
#include <limits>

#include "binding/check.h"
#include "binding/device.h"

namespace vlmkernels {

static int as_int(const Tensor& t, int64_t size) {
    if (size > std::numeric_limits<int>::max() / 8)
        value_error(t, "must have sizes below 2^28", shape_text(t));
    return int(size);
}

static void expect_like(const Tensor& t, const Tensor& x) {
    expect_same_dtype(t, x);
    expect_same_device(t, x);
}

static bool is_half(DType dtype) { return dtype == DType::kFloat16 || dtype == DType::kBFloat16; }

// Checks the lengths themselves where reading them costs no synchronisation: on the CPU.
static void check_key_lengths(const Tensor& key_lengths, const Tensor& x) {
    if (!key_lengths.given) return;
    expect_dtype(key_lengths, {DType::kInt32});
    expect_shape(key_lengths, {x.size(0)}, "(batch,)");
    expect_same_device(key_lengths, x);
    expect_contiguous(key_lengths);
    if (key_lengths.device.type != dlpack::kCPU) return;
    for (int64_t i = 0; i < x.size(0); ++i) {
        const int32_t length = key_lengths.ptr<int32_t>()[i];
        if (length < 0 || length > x.size(1))
            value_error(key_lengths,
                        "must be from 0 to num_tokens (" + std::to_string(x.size(1)) + ")",
                        std::to_string(length));
    }
}

// Everything that both forms of the op are given; fills in what a kernel needs of it.
static QFormerAttentionParams check(const Tensor& q, const Tensor& x, const Tensor& weight_k,
                                    const Tensor& weight_v, const Tensor& bias_k,
                                    const Tensor& bias_v, const Tensor& key_lengths,
                                    double softmax_scale) {
    const auto [batch_q, num_queries, num_heads, head_dim] =
        q.unpack<4>("(batch, num_queries, num_heads, head_dim)");
    const auto [batch, num_tokens, width] = x.unpack<3>("(batch, num_tokens, width)");
    expect_dtype(x, kFloats);
    expect_like(q, x);
    if (batch_q != batch && batch_q != 1)
        value_error(q, "must have the batch of x (" + std::to_string(batch) + ") or 1",
                    std::to_string(batch_q));
    if (num_heads < 1 || head_dim < 1)
        value_error(q, "must have at least one head and one dimension", shape_text(q));
    for (const Tensor* weight : {&weight_k, &weight_v}) {
        expect_like(*weight, x);
        expect_shape(*weight, {num_heads * head_dim, width}, "(num_heads * head_dim, width)");
    }
    for (const Tensor* bias : {&bias_k, &bias_v})
        if (bias->given) {
            expect_like(*bias, x);
            expect_shape(*bias, {num_heads * head_dim}, "(num_heads * head_dim,)");
        }
    check_key_lengths(key_lengths, x);
    if (!(softmax_scale > 0) || !std::isfinite(softmax_scale))
        value_error(x.op, "softmax_scale must be positive and finite, got " +
                              std::to_string(softmax_scale));
    QFormerAttentionParams p{};
    p.q = q.data;
    p.q_batch_size = batch_q == 1 ? 0 : num_queries * num_heads * head_dim;
    p.x = x.data;
    p.x_batch_stride = x.stride(0);
    p.x_token_stride = x.stride(1);
    p.weight_k = weight_k.data;
    p.weight_v = weight_v.data;
    p.bias_v = bias_v.data;
    p.key_lengths = key_lengths.ptr<int32_t>();
    p.batch = as_int(x, batch);
    p.num_queries = as_int(q, num_queries);
    p.num_heads = as_int(q, num_heads);
    p.head_dim = as_int(q, head_dim);
    p.num_tokens = as_int(x, num_tokens);
    p.width = as_int(x, width);
    p.softmax_scale = float(softmax_scale);
    p.dtype = x.dtype;
    return p;
}

static void expect_lse(const Tensor& lse, const QFormerAttentionParams& p, const Tensor& x) {
    expect_dtype(lse, {p.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32});
    expect_shape(lse, {p.batch, p.num_heads, p.num_queries}, "(batch, num_heads, num_queries)");
    expect_same_device(lse, x);
    expect_contiguous(lse);
}

// Kernels copy 16 bytes of a row of x at a time; head_dim matters to the forward kernel only.
static bool has_kernel(const Tensor& x, int head_dim) {
    return takes_cuda(x) && is_half(x.dtype) && x.size(2) % 8 == 0 && x.stride(0) % 8 == 0 &&
           x.stride(1) % 8 == 0 && reinterpret_cast<uintptr_t>(x.data) % 16 == 0 &&
           head_dim % 8 == 0 && head_dim <= kMaxHeadDim;
}

static void qformer_attention_check(py::handle q_, py::handle x_, py::handle weight_k_,
                                    py::handle weight_v_, py::handle bias_k_, py::handle bias_v_,
                                    py::handle key_lengths_, double softmax_scale) {
    const char* op = "qformer_attention";
    check(Tensor(op, "q", q_), Tensor(op, "x", x_), Tensor(op, "weight_k", weight_k_),
          Tensor(op, "weight_v", weight_v_), Tensor(op, "bias_k", bias_k_, true),
          Tensor(op, "bias_v", bias_v_, true), Tensor(op, "key_lengths", key_lengths_, true),
          softmax_scale);
}

static bool qformer_attention(py::handle q_, py::handle x_, py::handle weight_k_,
                              py::handle weight_v_, py::handle bias_k_, py::handle bias_v_,
                              py::handle key_lengths_, double softmax_scale, py::handle out_,
                              py::handle lse_) {
    const char* op = "qformer_attention";
    Tensor q(op, "q", q_), x(op, "x", x_), weight_k(op, "weight_k", weight_k_),
        weight_v(op, "weight_v", weight_v_), bias_k(op, "bias_k", bias_k_, true),
        bias_v(op, "bias_v", bias_v_, true), key_lengths(op, "key_lengths", key_lengths_, true),
        out(op, "out", out_), lse(op, "lse", lse_);
    QFormerAttentionParams p =
        check(q, x, weight_k, weight_v, bias_k, bias_v, key_lengths, softmax_scale);
    for (const Tensor* t : {&q, &weight_k, &weight_v, &out}) expect_contiguous(*t);
    if (bias_v.given) expect_contiguous(bias_v);
    expect_last_dim_contiguous(x);
    expect_like(out, x);
    expect_shape(out, {p.batch, p.num_queries, p.num_heads, p.head_dim},
                 "(batch, num_queries, num_heads, head_dim)");
    expect_lse(lse, p, x);
    p.out = out.data;
    p.lse = lse.ptr<float>();
    if (!has_kernel(x, p.head_dim)) return false;
    for (const Tensor* t : {&q, &weight_k, &weight_v, &out}) expect_aligned(*t);
    return run(x, [&](Stream stream) { return launch_qformer_attention(p, stream); }, nullptr);
}

static bool qformer_attention_backward(py::handle rows_, py::handle x_, py::handle key_lengths_,
                                       py::handle lse_, py::handle delta_, double softmax_scale,
                                       py::handle probabilities_, py::handle drows_,
                                       py::handle dx_) {
    const char* op = "qformer_attention_backward";
    Tensor rows(op, "rows", rows_), x(op, "x", x_),
        key_lengths(op, "key_lengths", key_lengths_, true), lse(op, "lse", lse_),
        delta(op, "delta", delta_), probabilities(op, "probabilities", probabilities_),
        drows(op, "drows", drows_), dx(op, "dx", dx_, true);
    const auto [batch, num_tokens, width] = x.unpack<3>("(batch, num_tokens, width)");
    expect_dtype(x, kFloats);
    expect_last_dim_contiguous(x);
    check_key_lengths(key_lengths, x);
    const auto [lse_batch, num_heads, num_queries] =
        lse.unpack<3>("(batch, num_heads, num_queries)");
    QFormerAttentionParams sizes{};
    sizes.batch = as_int(x, batch);
    sizes.num_heads = as_int(lse, num_heads);
    sizes.num_queries = as_int(lse, num_queries);
    sizes.dtype = x.dtype;
    for (const Tensor* t : {&lse, &delta}) expect_lse(*t, sizes, x);
    const int64_t num_columns = (num_tokens + 7) / 8 * 8;
    for (const Tensor* t : {&rows, &drows})
        expect_shape(*t, {2, num_heads, batch * num_queries, width},
                     "(2, num_heads, batch * num_queries, width)");
    expect_shape(probabilities, {batch, 2, num_heads * num_queries, num_columns},
                 "(batch, 2, num_heads * num_queries, num_columns)");
    if (dx.given) expect_same_shape(dx, x);
    for (const Tensor* t : {&rows, &drows, &probabilities, &dx})
        if (t->given) {
            expect_like(*t, x);
            expect_contiguous(*t);
        }
    if (!has_kernel(x, 8)) return false;
    for (const Tensor* t : {&rows, &drows, &probabilities, &dx})
        if (t->given) expect_aligned(*t);
    const QFormerAttentionBackwardParams p{.x = x.data,
                                           .x_batch_stride = x.stride(0),
                                           .x_token_stride = x.stride(1),
                                           .rows = rows.data,
                                           .key_lengths = key_lengths.ptr<int32_t>(),
                                           .lse = lse.ptr<float>(),
                                           .delta = delta.ptr<float>(),
                                           .probabilities = probabilities.data,
                                           .drows = drows.data,
                                           .dx = dx.data,
                                           .batch = sizes.batch,
                                           .num_queries = sizes.num_queries,
                                           .num_heads = sizes.num_heads,
                                           .num_tokens = as_int(x, num_tokens),
                                           .num_columns = as_int(x, num_columns),
                                           .width = as_int(x, width),
                                           .softmax_scale = float(softmax_scale),
                                           .dtype = x.dtype};
    return run(
        x, [&](Stream stream) { return launch_qformer_attention_backward(p, stream); }, nullptr);
}

static const Binding binding([](py::module_& m) {
    m.def("qformer_attention", &qformer_attention);
    m.def("qformer_attention_check", &qformer_attention_check);
    m.def("qformer_attention_backward", &qformer_attention_backward);
});

}  // namespace vlmkernels
