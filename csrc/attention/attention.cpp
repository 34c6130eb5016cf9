#include "attention/attention.h"

#include <cmath>
#include <limits>

#include "binding/check.h"
#include "binding/device.h"
#include "common/isa.h"

namespace vlmkernels {

static bool is_half(DType dtype) { return dtype == DType::kFloat16 || dtype == DType::kBFloat16; }

static HeadsView heads_view(const Tensor& t) {
    return {t.data, t.ndim == 4 ? t.stride(0) : 0, t.stride(-3), t.stride(-2)};
}

// Strides and, on their way to a CUDA kernel, alignment of a tensor of heads.
static void expect_rows(const Tensor& t) {
    expect_last_dim_contiguous(t);
    if (!takes_cuda(t) || !is_half(t.dtype)) return;
    expect_aligned(t);
    for (int i = 0; i + 1 < t.ndim; ++i)
        if (t.size(i) > 1 && t.stride(i) % 8)
            value_error(t, "must have strides that are multiples of 8 elements",
                        std::to_string(t.stride(i)) + " (call .contiguous())");
}

static int as_int(const Tensor& t, int64_t size) {
    if (size > std::numeric_limits<int>::max())
        value_error(t, "must have sizes below 2^31", shape_text(t));
    return int(size);
}

static void expect_like(const Tensor& t, const Tensor& q) {
    expect_same_dtype(t, q);
    expect_same_device(t, q);
    expect_rows(t);
}

// Fills in what q, k and v say; dense or packed by their rank.
static AttentionParams check_qkv(const Tensor& q, const Tensor& k, const Tensor& v, int rank) {
    const char* words =
        rank == 4 ? "(batch, seqlen, num_heads, head_dim), or (num_tokens, num_heads, head_dim) "
                    "with cu_seqlens_q"
                  : "(num_tokens, num_heads, head_dim) as cu_seqlens_q is given";
    for (const Tensor* t : {&q, &k, &v})
        if (t->ndim != rank)
            value_error(*t, std::string("must have shape ") + words, shape_text(*t));
    expect_dtype(q, kFloats);
    const int64_t head_dim = q.size(-1), num_heads = q.size(-2), num_heads_k = k.size(-2);
    if (head_dim < 8 || head_dim > kMaxHeadDim || head_dim % 8)
        value_error(q, "must have a head_dim that is a multiple of 8 from 8 to 256",
                    std::to_string(head_dim));
    expect_rows(q);
    expect_like(k, q);
    expect_like(v, q);
    if (k.size(-1) != head_dim)
        value_error(k, "must have the head_dim of q (" + std::to_string(head_dim) + ")",
                    std::to_string(k.size(-1)));
    if (num_heads < 1 || num_heads_k < 1 || num_heads % num_heads_k)
        value_error(
            k, "must have a num_heads_k that divides num_heads (" + std::to_string(num_heads) + ")",
            std::to_string(num_heads_k));
    if (rank == 4 && k.size(0) != q.size(0))
        value_error(k, "must have the batch of q (" + std::to_string(q.size(0)) + ")",
                    std::to_string(k.size(0)));
    expect_same_shape(v, k);
    AttentionParams p{};
    p.q = heads_view(q);
    p.k = heads_view(k);
    p.v = heads_view(v);
    p.batch = as_int(q, q.size(0));
    p.seqlen_q = as_int(q, q.size(-3));
    p.seqlen_k = as_int(k, k.size(-3));
    p.num_tokens_q = q.numel() / (q.size(-2) * q.size(-1));
    p.num_tokens_k = k.numel() / (k.size(-2) * k.size(-1));
    p.num_heads = as_int(q, num_heads);
    p.num_heads_k = as_int(k, num_heads_k);
    p.head_dim = int(head_dim);
    p.dtype = q.dtype;
    return p;
}

static void set_scale(AttentionParams& p, const char* op, bool causal, double softmax_scale) {
    if (!(softmax_scale > 0) || !std::isfinite(softmax_scale))
        value_error(
            op, "softmax_scale must be positive and finite, got " + std::to_string(softmax_scale));
    p.causal = causal;
    p.softmax_scale = float(softmax_scale);
}

// Checks the lengths themselves where reading them costs no synchronisation: on the CPU.
static void check_cu_seqlens(const Tensor& cu, const Tensor& q, const Tensor& tokens,
                             int64_t max_seqlen) {
    expect_dtype(cu, {DType::kInt32});
    expect_same_device(cu, q);
    expect_contiguous(cu);
    if (cu.ndim != 1 || cu.numel() < 1)
        value_error(cu, "must have shape (batch + 1,)", shape_text(cu));
    if (max_seqlen < 0 || max_seqlen > std::numeric_limits<int>::max())
        value_error(cu.op,
                    "max_seqlen must be from 0 to 2^31 - 1, got " + std::to_string(max_seqlen));
    if (cu.device.type != dlpack::kCPU) return;
    const int32_t* at = cu.ptr<int32_t>();
    const int64_t n = cu.numel();
    if (at[0] != 0) value_error(cu, "must start at 0", std::to_string(at[0]));
    for (int64_t i = 1; i < n; ++i) {
        const int64_t length = int64_t(at[i]) - at[i - 1];
        if (length < 0)
            value_error(cu, "must not decrease",
                        std::to_string(at[i - 1]) + ", " + std::to_string(at[i]));
        if (length > max_seqlen)
            value_error(
                cu,
                "must hold no sequence longer than max_seqlen (" + std::to_string(max_seqlen) + ")",
                std::to_string(length));
    }
    if (at[n - 1] != tokens.size(0))
        value_error(cu,
                    std::string("must end at the num_tokens of ") + tokens.name + " (" +
                        std::to_string(tokens.size(0)) + ")",
                    std::to_string(at[n - 1]));
}

// q, k, v and, when packed, the lengths.
static AttentionParams check_inputs(const Tensor& q, const Tensor& k, const Tensor& v,
                                    const Tensor& cu_q, const Tensor& cu_k, int64_t max_seqlen_q,
                                    int64_t max_seqlen_k, bool causal, double softmax_scale) {
    AttentionParams p = check_qkv(q, k, v, cu_q.given ? 3 : 4);
    set_scale(p, q.op, causal, softmax_scale);
    if (!cu_q.given) return p;
    check_cu_seqlens(cu_q, q, q, max_seqlen_q);
    check_cu_seqlens(cu_k, q, k, max_seqlen_k);
    expect_same_shape(cu_k, cu_q);
    p.cu_seqlens_q = cu_q.ptr<int32_t>();
    p.cu_seqlens_k = cu_k.ptr<int32_t>();
    p.batch = as_int(cu_q, cu_q.numel() - 1);
    p.seqlen_q = int(max_seqlen_q);
    p.seqlen_k = int(max_seqlen_k);
    return p;
}

static void expect_lse(const Tensor& lse, const Tensor& q) {
    expect_dtype(lse, {q.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32});
    if (q.ndim == 4)
        expect_shape(lse, {q.size(0), q.size(2), q.size(1)}, "(batch, num_heads, seqlen_q)");
    else
        expect_shape(lse, {q.size(1), q.size(0)}, "(num_heads, num_tokens_q)");
    expect_same_device(lse, q);
    expect_contiguous(lse);
}

static void expect_delta(const Tensor& delta, const Tensor& lse) {
    if (delta.ndim == 0 || delta.numel() != 2 * lse.numel())
        value_error(delta, "must hold 2 lse", shape_text(delta));
    expect_same_dtype(delta, lse);
    expect_same_device(delta, lse);
    expect_contiguous(delta);
    expect_aligned(delta, 8);
}

static void set_outputs(AttentionParams& p, const Tensor& q, const Tensor& out, const Tensor& lse) {
    expect_same_shape(out, q);
    expect_like(out, q);
    expect_lse(lse, q);
    p.out = heads_view(out);
    p.lse = lse.ptr<float>();
    p.lse_batch_stride =
        q.ndim == 4 ? q.size(-2) * q.size(-3) : 0;  // of empty ones torch has others
    p.lse_head_stride = q.size(-3);
}

// A CUDA kernel takes 16-bit floats; a CPU kernel also float32.
static bool has_kernel(const Tensor& q) {
    return is_half(q.dtype) || (q.dtype == DType::kFloat32 && !takes_cuda(q));
}

static bool attention(py::handle q_, py::handle k_, py::handle v_, py::handle out_, py::handle lse_,
                      py::handle cu_q_, py::handle cu_k_, int64_t max_seqlen_q,
                      int64_t max_seqlen_k, bool causal, double softmax_scale) {
    const char* op = "attention";
    Tensor q(op, "q", q_), k(op, "k", k_), v(op, "v", v_), out(op, "out", out_);
    Tensor lse(op, "lse", lse_), cu_q(op, "cu_seqlens_q", cu_q_, true);
    Tensor cu_k(op, "cu_seqlens_k", cu_k_, !cu_q.given);
    AttentionParams p =
        check_inputs(q, k, v, cu_q, cu_k, max_seqlen_q, max_seqlen_k, causal, softmax_scale);
    set_outputs(p, q, out, lse);
    if (!has_kernel(q)) return false;
    return run(
        q, [&](Stream stream) { return launch_attention(p, stream); },
        [&] { dispatch_isa([&]<class Isa>() { attention_fwd_cpu<Isa>(p); }); });
}

static bool attention_backward(py::handle dout_, py::handle dlse_, py::handle q_, py::handle k_,
                               py::handle v_, py::handle out_, py::handle lse_, py::handle delta_,
                               py::handle dq_, py::handle dk_, py::handle dv_, py::handle cu_q_,
                               py::handle cu_k_, int64_t max_seqlen_q, int64_t max_seqlen_k,
                               bool causal, double softmax_scale) {
    const char* op = "attention_backward";
    Tensor dout(op, "dout", dout_), dlse(op, "dlse", dlse_, true);
    Tensor q(op, "q", q_), k(op, "k", k_), v(op, "v", v_), out(op, "out", out_);
    Tensor lse(op, "lse", lse_), delta(op, "delta", delta_);
    Tensor dq(op, "dq", dq_), dk(op, "dk", dk_), dv(op, "dv", dv_);
    Tensor cu_q(op, "cu_seqlens_q", cu_q_, true), cu_k(op, "cu_seqlens_k", cu_k_, !cu_q.given);
    AttentionBackwardParams p{
        check_inputs(q, k, v, cu_q, cu_k, max_seqlen_q, max_seqlen_k, causal, softmax_scale)};
    set_outputs(p, q, out, lse);
    for (const Tensor* t : {&dout, &dq}) expect_same_shape(*t, q);
    for (const Tensor* t : {&dk, &dv}) expect_same_shape(*t, k);
    for (const Tensor* t : {&dout, &dq, &dk, &dv}) expect_like(*t, q);
    expect_delta(delta, lse);
    if (dlse.given) expect_lse(dlse, q);
    p.dout = heads_view(dout);
    p.dlse = dlse.ptr<float>();
    p.delta = delta.ptr<float>();
    p.dq = heads_view(dq);
    p.dk = heads_view(dk);
    p.dv = heads_view(dv);
    if (!has_kernel(q)) return false;
    return run(
        q, [&](Stream stream) { return launch_attention_backward(p, stream); },
        [&] { dispatch_isa([&]<class Isa>() { attention_bwd_cpu<Isa>(p); }); });
}

static void check_cache_seqlens(const Tensor& cache_seqlens, const Tensor& q, const Tensor& cache) {
    expect_dtype(cache_seqlens, {DType::kInt32});
    expect_shape(cache_seqlens, {q.size(0)}, "(batch,)");
    expect_same_device(cache_seqlens, q);
    expect_contiguous(cache_seqlens);
    if (q.device.type != dlpack::kCPU) return;
    for (int64_t i = 0; i < q.size(0); ++i) {
        const int32_t length = cache_seqlens.ptr<int32_t>()[i];
        if (length < 0 || length > cache.size(1))
            value_error(cache_seqlens,
                        "must be from 0 to max_seqlen (" + std::to_string(cache.size(1)) + ")",
                        std::to_string(length));
    }
}

// Returns the number of splits of the keys to allocate for: 1 where no workspace is needed.
static int decode_splits(py::handle q_, py::handle k_, py::handle v_) {
    const char* op = "attention_decode";
    Tensor q(op, "q", q_), k(op, "k_cache", k_), v(op, "v_cache", v_);
    AttentionParams p = check_qkv(q, k, v, 4);
    int num_splits = 1;
    if (takes_cuda(q) && is_half(q.dtype))
        run(q, [&](Stream) { return attention_decode_splits(p, &num_splits); }, nullptr);
    return num_splits;
}

static void set_partials(AttentionDecodeParams& p, const Tensor& q, const Tensor& partial_out,
                         const Tensor& partial_lse) {
    const int64_t splits = partial_out.ndim == 5 ? partial_out.size(0) : 1;
    if (splits < 1) value_error(partial_out, "must hold a split", shape_text(partial_out));
    p.num_splits = as_int(partial_out, splits);
    expect_shape(partial_out, {splits, q.size(0), q.size(1), q.size(2), q.size(3)},
                 "(num_splits, batch, seqlen_q, num_heads, head_dim)");
    expect_shape(partial_lse, {splits, q.size(0), q.size(2), q.size(1)},
                 "(num_splits, batch, num_heads, seqlen_q)");
    for (const Tensor* t : {&partial_out, &partial_lse}) {
        expect_dtype(*t, {DType::kFloat32});
        expect_same_device(*t, q);
        expect_contiguous(*t);
    }
    expect_aligned(partial_out);
    p.partial_out = partial_out.ptr<float>();
    p.partial_lse = partial_lse.ptr<float>();
}

static bool attention_decode(py::handle q_, py::handle k_, py::handle v_, py::handle cache_seqlens_,
                             py::handle out_, py::handle lse_, py::handle partial_out_,
                             py::handle partial_lse_, bool causal, double softmax_scale) {
    const char* op = "attention_decode";
    Tensor q(op, "q", q_), k(op, "k_cache", k_), v(op, "v_cache", v_), out(op, "out", out_);
    Tensor lse(op, "lse", lse_), cache_seqlens(op, "cache_seqlens", cache_seqlens_);
    Tensor partial_out(op, "partial_out", partial_out_, true);
    Tensor partial_lse(op, "partial_lse", partial_lse_, !partial_out.given);
    AttentionDecodeParams p{check_qkv(q, k, v, 4)};
    set_scale(p, op, causal, softmax_scale);
    set_outputs(p, q, out, lse);
    check_cache_seqlens(cache_seqlens, q, k);
    p.cache_seqlens = cache_seqlens.ptr<int32_t>();
    p.num_splits = 1;
    if (partial_out.given) set_partials(p, q, partial_out, partial_lse);
    if (!has_kernel(q)) return false;
    return run(
        q, [&](Stream stream) { return launch_attention_decode(p, stream); },
        [&] { dispatch_isa([&]<class Isa>() { attention_decode_cpu<Isa>(p); }); });
}

static const Binding binding([](py::module_& m) {
    m.def("attention", &attention);
    m.def("attention_backward", &attention_backward);
    m.def("attention_decode", &attention_decode);
    m.def("attention_decode_splits", &decode_splits);
});

}  // namespace vlmkernels
