#include "attention/attention_check.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "binding/check.h"
#include "binding/device.h"

namespace vlmkernels {

bool is_half(DType dtype) { return dtype == DType::kFloat16 || dtype == DType::kBFloat16; }

HeadsView heads_view(const Tensor& t) {
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

int as_int(const Tensor& t, int64_t size) {
    if (size > std::numeric_limits<int>::max())
        value_error(t, "must have sizes below 2^31", shape_text(t));
    return int(size);
}

void expect_heads_like(const Tensor& t, const Tensor& q) {
    expect_same_dtype(t, q);
    expect_same_device(t, q);
    expect_rows(t);
}

// Fills in what q, k and v say; dense or packed by their rank.
AttentionParams check_qkv(const Tensor& q, const Tensor& k, const Tensor& v, int rank, bool paged) {
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
    expect_heads_like(k, q);
    expect_heads_like(v, q);
    if (k.size(-1) != head_dim)
        value_error(k, "must have the head_dim of q (" + std::to_string(head_dim) + ")",
                    std::to_string(k.size(-1)));
    if (num_heads < 1 || num_heads_k < 1 || num_heads % num_heads_k)
        value_error(
            k, "must have a num_heads_k that divides num_heads (" + std::to_string(num_heads) + ")",
            std::to_string(num_heads_k));
    if (rank == 4 && !paged && k.size(0) != q.size(0))
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
    p.num_tokens_q = q.numel() / (num_heads * head_dim);
    p.num_tokens_k = k.numel() / (num_heads_k * head_dim);
    p.num_heads = as_int(q, num_heads);
    p.num_heads_k = as_int(k, num_heads_k);
    p.head_dim = int(head_dim);
    p.dtype = q.dtype;
    return p;
}

// -1 where the window is no limit, so that as many calls as possible are plain.
static int window_side(const char* op, const char* side, int64_t size, int64_t length) {
    if (size < -1)
        value_error(op, std::string("window_size must be -1 (unbounded) or not negative, got ") +
                            std::to_string(size) + " on the " + side);
    return size >= length ? -1 : int(size);
}

void set_scores(AttentionParams& p, const char* op, const ScoreOptions& options) {
    const double softmax_scale = options.softmax_scale, softcap = options.softcap;
    if (!(softmax_scale > 0) || !std::isfinite(softmax_scale))
        value_error(
            op, "softmax_scale must be positive and finite, got " + std::to_string(softmax_scale));
    if (!(softcap >= 0) || !std::isfinite(softcap))
        value_error(
            op, "softcap must be 0 (none) or positive and finite, got " + std::to_string(softcap));
    p.softmax_scale = float(softmax_scale);
    p.softcap = float(softcap);
    p.window_left = window_side(op, "left", options.window_left, p.seqlen_k);
    p.window_right = window_side(op, "right", options.window_right, p.seqlen_q);
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
        value_error(cu.op, std::string("max_seqlen_") + std::string(cu.name).back() +
                               " must be from 0 to 2^31 - 1, got " + std::to_string(max_seqlen));
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

// A bias, or its gradient: (1 or batch, 1 or num_heads, seqlen_q, seqlen_k).
BiasView check_bias(const Tensor& bias, const Tensor& q, const AttentionParams& p) {
    if (!bias.given) return {};
    const bool packed = p.cu_seqlens_q;
    auto fits = [&](int dim, int64_t size, bool broadcast) {
        const int64_t got = bias.size(dim);
        return got == size || (broadcast && got == 1) || (packed && !broadcast && got > size);
    };
    if (bias.ndim != 4 || !fits(0, p.batch, true) || !fits(1, p.num_heads, true) ||
        !fits(2, p.seqlen_q, false) || !fits(3, p.seqlen_k, false)) {
        const std::string words = packed
                                      ? "(1 or batch, 1 or num_heads, max_seqlen_q, max_seqlen_k)"
                                      : "(1 or batch, 1 or num_heads, seqlen_q, seqlen_k)";
        value_error(bias,
                    "must have shape " + words + " with batch " + std::to_string(p.batch) +
                        ", num_heads " + std::to_string(p.num_heads) + ", lengths " +
                        std::to_string(p.seqlen_q) + " and " + std::to_string(p.seqlen_k),
                    shape_text(bias));
    }
    if (bias.dtype != DType::kFloat32) expect_same_dtype(bias, q);
    expect_same_device(bias, q);
    if (bias.numel()) expect_last_dim_contiguous(bias);
    auto stride = [&](int dim) { return bias.size(dim) == 1 ? 0 : bias.stride(dim); };
    return {bias.data,         stride(0),         stride(1),
            bias.stride(2),    int(bias.size(0)), int(bias.size(1)),
            int(bias.size(2)), int(bias.size(3)), bias.dtype};
}

static const int32_t* check_ids(const Tensor& ids, const Tensor& heads) {
    if (!ids.given) return nullptr;
    expect_dtype(ids, {DType::kInt32});
    expect_same_device(ids, heads);
    if (heads.ndim == 4)
        expect_shape(ids, {heads.size(0), heads.size(1)}, "(batch, seqlen)");
    else
        expect_shape(ids, {heads.size(0)}, "(num_tokens,)");
    expect_contiguous(ids);
    return ids.ptr<int32_t>();
}

static const int32_t* check_spans(const Tensor& spans, const Tensor& q) {
    if (!spans.given) return nullptr;
    expect_dtype(spans, {DType::kInt32});
    expect_same_device(spans, q);
    if (q.ndim == 4)
        expect_shape(spans, {q.size(0), q.size(1), 2}, "(batch, seqlen_q, 2)");
    else
        expect_shape(spans, {q.size(0), 2}, "(num_tokens_q, 2)");
    expect_contiguous(spans);
    expect_aligned(spans, 8);
    return spans.ptr<int32_t>();
}

static void set_ids(AttentionParams& p, const Tensor& q, const Tensor& k, const Masks& masks) {
    auto expect_both = [&](const Tensor& of_q, const Tensor& of_k) {
        if (of_q.given != of_k.given)
            value_error(q.op,
                        std::string(of_q.name) + " and " + of_k.name + " must be given together");
    };
    expect_both(masks.segments_q, masks.segments_k);
    expect_both(masks.images_q, masks.images_k);
    p.segments = {check_ids(masks.segments_q, q), check_ids(masks.segments_k, k)};
    p.images = {check_ids(masks.images_q, q), check_ids(masks.images_k, k)};
    p.spans = check_spans(masks.spans, q);
    if (p.spans && (p.segments.q || p.images.q || p.window_left >= 0 || p.window_right >= 0))
        value_error(q.op, "key_spans must not be given together with another mask");
    if (!p.has_ids() || !takes_cuda(q)) return;
    const Tensor& ranges = masks.id_ranges;
    expect_dtype(ranges, {DType::kInt32});
    expect_same_device(ranges, q);
    expect_shape(ranges, {id_blocks(p.num_tokens_q) + id_blocks(p.num_tokens_k), 4},
                 "(blocks of 64 tokens, 4)");
    expect_contiguous(ranges);
    expect_aligned(ranges);
    p.id_ranges = ranges.ptr<int32_t>();
}

static void set_tile_order(AttentionParams& p, const Tensor& q, const Tensor& order) {
    if (!takes_cuda(q)) return;
    const int64_t slots = tile_slots(std::max(p.num_tokens_q, p.num_tokens_k), p.batch);
    expect_dtype(order, {DType::kInt32});
    expect_same_device(order, q);
    expect_shape(order, {1 + slots, 2}, "(1 + num_tokens / 64 + batch, 2)");
    expect_contiguous(order);
    expect_aligned(order, 8);
    p.tile_order = order.ptr<int32_t>();
    p.tile_slots = as_int(order, slots);
}

// q, k, v, the lengths when packed, and all that happens to scores.
AttentionParams check_inputs(const Tensor& q, const Tensor& k, const Tensor& v, const Masks& masks,
                             const ScoreOptions& options) {
    const Tensor &cu_q = masks.cu_seqlens_q, &cu_k = masks.cu_seqlens_k;
    AttentionParams p = check_qkv(q, k, v, cu_q.given ? 3 : 4);
    if (cu_q.given) {
        check_cu_seqlens(cu_q, q, q, options.max_seqlen_q);
        check_cu_seqlens(cu_k, q, k, options.max_seqlen_k);
        expect_same_shape(cu_k, cu_q);
        p.cu_seqlens_q = cu_q.ptr<int32_t>();
        p.cu_seqlens_k = cu_k.ptr<int32_t>();
        p.batch = as_int(cu_q, cu_q.numel() - 1);
        // No sequence is longer than all tokens: a careless bound costs nothing.
        p.seqlen_q = int(std::min(options.max_seqlen_q, p.num_tokens_q));
        p.seqlen_k = int(std::min(options.max_seqlen_k, p.num_tokens_k));
        set_tile_order(p, q, masks.tile_order);
    }
    set_scores(p, q.op, options);
    p.bias = check_bias(masks.bias, q, p);
    set_ids(p, q, k, masks);
    return p;
}

void expect_lse(const Tensor& lse, const Tensor& q) {
    expect_dtype(lse, {q.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32});
    if (q.ndim == 4)
        expect_shape(lse, {q.size(0), q.size(2), q.size(1)}, "(batch, num_heads, seqlen_q)");
    else
        expect_shape(lse, {q.size(1), q.size(0)}, "(num_heads, num_tokens_q)");
    expect_same_device(lse, q);
    expect_contiguous(lse);
}

void expect_delta(const Tensor& delta, const Tensor& lse) {
    if (delta.ndim == 0 || delta.numel() != 2 * lse.numel())
        value_error(delta, "must hold 2 lse", shape_text(delta));
    expect_same_dtype(delta, lse);
    expect_same_device(delta, lse);
    expect_contiguous(delta);
    expect_aligned(delta, 8);
}

// Of the dtype of q, or float32.
void expect_result(const Tensor& t, const Tensor& like) {
    expect_same_shape(t, like);
    if (t.dtype != DType::kFloat32) expect_same_dtype(t, like);
    expect_same_device(t, like);
    expect_rows(t);
}

void set_lse(AttentionParams& p, const Tensor& q, const Tensor& lse) {
    expect_lse(lse, q);
    p.lse = lse.ptr<float>();
    p.lse_batch_stride =
        q.ndim == 4 ? q.size(-2) * q.size(-3) : 0;  // of empty ones torch has others
    p.lse_head_stride = q.size(-3);
}

// A CUDA kernel takes 16-bit floats; a CPU kernel also float32.
bool has_kernel(const Tensor& q) {
    return is_half(q.dtype) || (q.dtype == DType::kFloat32 && !takes_cuda(q));
}

}  // namespace vlmkernels
