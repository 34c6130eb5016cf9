#include "binding/rotation.h"

#include <algorithm>
#include <string>
#include <vector>

#include "binding/check.h"

namespace vlmkernels {

static bool is_dense(const Tensor& q) { return q.ndim == 4; }

HeadStrides head_strides(const Tensor& t) {
    return is_dense(t) ? HeadStrides{t.size(0) > 1 ? t.stride(0) : 0, t.stride(1), t.stride(2)}
                       : HeadStrides{0, t.stride(0), t.stride(1)};
}

int64_t num_tokens_of(const Tensor& q) { return is_dense(q) ? q.size(0) * q.size(1) : q.size(0); }

void expect_heads(const Tensor& q, const Tensor& k) {
    if (!is_dense(q))
        q.unpack<3>("(num_tokens, num_heads, head_dim) or (batch, seqlen, num_heads, head_dim)");
    bool same = k.ndim == q.ndim && k.size(-1) == q.size(-1);
    for (int i = 0; same && i < q.ndim - 2; ++i) same = k.size(i) == q.size(i);
    if (!same)
        value_error(k, "must have the shape of q " + shape_text(q) + " but for num_heads",
                    shape_text(k));
    expect_same_dtype(k, q);
    expect_same_device(k, q);
    for (const Tensor* x : {&q, &k}) {
        expect_dtype(*x, kFloats);
        expect_last_dim_contiguous(*x);
        if (x->size(-2) >= 1 << 24 || x->size(-1) >= 1 << 24)
            value_error(*x, "must have num_heads and head_dim below 2^24", shape_text(*x));
    }
    if (num_tokens_of(q) > INT32_MAX)
        value_error(q, "must have fewer than 2^31 tokens", shape_text(q));
}

void expect_output_heads(const Tensor& out, const Tensor& x) {
    expect_same_shape(out, x);
    expect_same_dtype(out, x);
    expect_same_device(out, x);
    expect_last_dim_contiguous(out);
    expect_no_overlap(out);
}

void expect_no_overlap(const Tensor& out) {
    if (!out.numel()) return;
    int64_t extent = 0;  // offset of the last element, over the dimensions seen
    bool seen[8] = {};
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

// The addresses at which the heads of one row of tokens, or of all, begin.
static std::vector<uintptr_t> heads_begin(const Tensor& x, bool one_token) {
    const HeadStrides s = head_strides(x);
    const int64_t batch = is_dense(x) ? x.size(0) : 1, seqlen = x.size(-3);
    const int64_t element = size_of(x.dtype);
    std::vector<uintptr_t> begin;
    for (int64_t b = 0; b < (one_token ? 1 : batch); ++b)
        for (int64_t t = 0; t < (one_token ? 1 : seqlen); ++t)
            for (int64_t h = 0; h < x.size(-2); ++h)
                begin.push_back(reinterpret_cast<uintptr_t>(x.data) +
                                (b * s.batch + t * s.token + h * s.head) * element);
    std::sort(begin.begin(), begin.end());
    return begin;
}

void expect_disjoint(const Tensor& q, const Tensor& k) {
    if (!q.numel() || !k.numel()) return;
    const uintptr_t bytes = q.size(-1) * size_of(q.dtype);
    auto share = [&](const std::vector<uintptr_t>& a, const std::vector<uintptr_t>& b) {
        for (size_t i = 0, j = 0; i < a.size() && j < b.size(); a[i] < b[j] ? ++i : ++j)
            if ((a[i] < b[j] ? b[j] - a[i] : a[i] - b[j]) < bytes) return true;
        return false;
    };
    auto end = [&](const Tensor& x) {  // of its last byte
        int64_t last = x.size(-1);
        for (int i = 0; i < x.ndim - 1; ++i) last += (x.size(i) - 1) * x.stride(i);
        return reinterpret_cast<uintptr_t>(x.data) + last * size_of(x.dtype);
    };
    const uintptr_t q_begin = reinterpret_cast<uintptr_t>(q.data), q_end = end(q);
    const uintptr_t k_begin = reinterpret_cast<uintptr_t>(k.data), k_end = end(k);
    if (q_end <= k_begin || k_end <= q_begin) return;
    // Slices of a fused qkv: all heads of a token lie before the next token's, so that what holds
    // for one token holds for all. Anything else is looked at head by head.
    const HeadStrides s = head_strides(q), t = head_strides(k);
    const std::vector<uintptr_t> a = heads_begin(q, true), b = heads_begin(k, true);
    const uintptr_t first = std::min(a[0], b[0]), last = std::max(a.back(), b.back()) + bytes;
    const int64_t span = (last - first) / size_of(q.dtype);
    const bool nested = s.token == t.token && s.batch == t.batch && span <= s.token &&
                        (!s.batch || s.batch >= s.token * q.size(-3));
    if (nested ? share(a, b) : share(heads_begin(q, false), heads_begin(k, false)))
        value_error(q.op, "q and k must not share their memory to be written in place");
}

static void expect_pairs(const Tensor& q, int64_t num_pairs) {
    if (num_pairs < 1 || 2 * num_pairs > q.size(-1) || num_pairs > kMaxPairs)
        value_error(q.op, "rotary_dim must be even, at most 256 and at most head_dim (" +
                              std::to_string(q.size(-1)) + "), got " +
                              std::to_string(2 * num_pairs));
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

static Rotation rotation_of(const Tensor& q, int64_t num_pairs, bool inverse) {
    expect_pairs(q, num_pairs);
    Rotation r{};
    r.seqlen = int(q.size(-3));
    r.num_pairs = int(num_pairs);
    r.inverse = inverse;
    return r;
}

Rotation rotation_of_positions(const Tensor& q, const Tensor& position_ids, const Tensor& inv_freq,
                               const Tensor& axis, int num_axes, bool inverse) {
    Rotation r = rotation_of(q, inv_freq.numel(), inverse);
    if (num_axes < 1 || num_axes > 3)
        value_error(q.op, "there must be 1 to 3 sections, got " + std::to_string(num_axes));
    expect_shape(axis, {inv_freq.numel()}, "(num_pairs,)");
    expect_dtype(position_ids, kInts);
    expect_same_device(position_ids, q);
    expect_tokens(position_ids, q, num_axes > 1 ? num_axes : 0, 0);
    const int first = num_axes > 1 ? 1 : 0;
    r.position_ids = position_ids.data;
    r.num_axes = num_axes;
    r.position_dtype = position_ids.dtype;
    r.position_axis_stride = first ? position_ids.stride(0) : 0;
    r.position_batch_stride =
        is_dense(q) && position_ids.size(first) > 1 ? position_ids.stride(first) : 0;
    r.position_token_stride = position_ids.stride(-1);
    for (int i = 0; i < r.num_pairs; ++i) {
        r.inv_freq[i] = inv_freq.ptr<const float>()[i];
        const int64_t of_pair = axis.ptr<const int64_t>()[i];
        if (of_pair < 0 || of_pair >= num_axes)
            value_error(axis, "must be below " + std::to_string(num_axes), std::to_string(of_pair));
        r.axis[i] = uint8_t(of_pair);
    }
    return r;
}

Rotation rotation_of_tables(const Tensor& q, const Tensor& cos, const Tensor& sin,
                            int64_t rotary_dim, bool inverse) {
    if (rotary_dim % 2)
        value_error(q.op, "rotary_dim must be even, got " + std::to_string(rotary_dim));
    Rotation r = rotation_of(q, rotary_dim / 2, inverse);
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
    r.cos = cos.data;
    r.sin = sin.data;
    r.table_dtype = cos.dtype;
    auto strides = [&](const Tensor& t) {
        return is_dense(q) ? HeadStrides{t.size(0) > 1 ? t.stride(0) : 0, t.stride(1), 0}
                           : HeadStrides{0, t.stride(0), 0};
    };
    r.cos_strides = strides(cos);
    r.sin_strides = strides(sin);
    return r;
}

}  // namespace vlmkernels
