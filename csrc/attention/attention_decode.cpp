#include "attention/attention_check.h"
#include "attention/cache_append.h"
#include "binding/check.h"
#include "binding/device.h"
#include "common/isa.h"

namespace vlmkernels {

// Takes the shape of a paged cache from block_table; returns the keys that a row may have.
static void set_pages(AttentionParams& p, const Tensor& block_table, const Tensor& q,
                      const Tensor& cache) {
    if (!block_table.given) return;
    expect_dtype(block_table, {DType::kInt32});
    expect_same_device(block_table, q);
    if (block_table.ndim != 2 || block_table.size(0) != q.size(0))
        value_error(block_table,
                    "must have shape (batch, pages) with batch " + std::to_string(q.size(0)),
                    shape_text(block_table));
    expect_last_dim_contiguous(block_table);
    if (cache.size(1) < 1 || cache.size(1) % 16)
        value_error(cache, "must have pages of a multiple of 16 keys, as block_table is given",
                    std::to_string(cache.size(1)));
    p.block_table = block_table.ptr<int32_t>();
    p.block_table_stride = block_table.stride(0);
    p.page_size = cache.size(1);
    p.seqlen_k = as_int(block_table, block_table.size(1) * cache.size(1));
}

// The pages that hold a row's keys must exist. Checked on the CPU, where it costs nothing.
static void check_pages(const AttentionParams& p, const Tensor& block_table, const Tensor& cache,
                        int64_t new_tokens = 0) {
    if (!block_table.given || cache.device.type != dlpack::kCPU) return;
    for (int64_t row = 0; row < p.batch; ++row)
        for (int64_t i = 0; i * p.page_size < p.cache_seqlens[row] + new_tokens; ++i) {
            const int32_t page = p.block_table[row * p.block_table_stride + i];
            if (page < 0 || page >= cache.size(0))
                value_error(block_table,
                            "must hold pages from 0 to " + std::to_string(cache.size(0) - 1),
                            std::to_string(page));
        }
}

static void check_cache_seqlens(const Tensor& cache_seqlens, const Tensor& q, int max_seqlen) {
    expect_dtype(cache_seqlens, {DType::kInt32});
    expect_shape(cache_seqlens, {q.size(0)}, "(batch,)");
    expect_same_device(cache_seqlens, q);
    expect_contiguous(cache_seqlens);
    if (q.device.type != dlpack::kCPU) return;
    for (int64_t i = 0; i < q.size(0); ++i) {
        const int32_t length = cache_seqlens.ptr<int32_t>()[i];
        if (length < 0 || length > max_seqlen)
            value_error(cache_seqlens,
                        "must be from 0 to max_seqlen (" + std::to_string(max_seqlen) + ")",
                        std::to_string(length));
    }
}

// Returns the number of splits of the keys to allocate for: 1 where no workspace is needed.
static int decode_splits(py::handle q_, py::handle k_, py::handle v_, py::handle block_table_) {
    const char* op = "attention_decode";
    Tensor q(op, "q", q_), k(op, "k_cache", k_), v(op, "v_cache", v_);
    Tensor block_table(op, "block_table", block_table_, true);
    AttentionParams p = check_qkv(q, k, v, 4, block_table.given);
    set_pages(p, block_table, q, k);
    int num_splits = 1;
    if (takes_cuda(q) && is_half(q.dtype))
        run(q, [&](Stream) { return num_splits = attention_decode_splits(p), Error(0); }, nullptr);
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
                             py::handle block_table_, py::handle out_, py::handle lse_,
                             py::handle partial_out_, py::handle partial_lse_, int64_t window_left,
                             int64_t window_right, double softmax_scale, double softcap) {
    const char* op = "attention_decode";
    Tensor q(op, "q", q_), k(op, "k_cache", k_), v(op, "v_cache", v_), out(op, "out", out_);
    Tensor lse(op, "lse", lse_), cache_seqlens(op, "cache_seqlens", cache_seqlens_);
    Tensor block_table(op, "block_table", block_table_, true);
    Tensor partial_out(op, "partial_out", partial_out_, true);
    Tensor partial_lse(op, "partial_lse", partial_lse_, !partial_out.given);
    AttentionDecodeParams p{check_qkv(q, k, v, 4, block_table.given)};
    set_pages(p, block_table, q, k);
    set_scores(p, op, {0, 0, window_left, window_right, softmax_scale, softcap});
    set_lse(p, q, lse);
    expect_same_shape(out, q);
    expect_heads_like(out, q);
    p.out = heads_view(out);
    check_cache_seqlens(cache_seqlens, q, p.seqlen_k);
    p.cache_seqlens = cache_seqlens.ptr<int32_t>();
    check_pages(p, block_table, k);
    p.num_splits = 1;
    if (partial_out.given) set_partials(p, q, partial_out, partial_lse);
    if (!has_kernel(q)) return false;
    return run(
        q, [&](Stream stream) { return launch_attention_decode(p, stream); },
        [&] { dispatch_isa([&]<class Isa>() { attention_decode_cpu<Isa>(p); }); });
}

static void set_rotation(CacheAppendParams& p, const Tensor& cos, const Tensor& sin,
                         const Tensor& k) {
    p.table_dtype = p.dtype;
    if (!cos.given) return;
    if (cos.ndim != 2 || cos.size(0) < p.capacity || cos.size(1) % 8 ||
        cos.size(1) * 2 > p.head_dim)
        value_error(cos,
                    "must have shape (max_seqlen or more, rotary_dim / 2) with max_seqlen " +
                        std::to_string(p.capacity) + " and rotary_dim a multiple of 16 up to " +
                        std::to_string(p.head_dim),
                    shape_text(cos));
    expect_same_shape(sin, cos);
    expect_same_dtype(sin, cos);
    for (const Tensor* t : {&cos, &sin}) {
        if (t->dtype != DType::kFloat32) expect_same_dtype(*t, k);
        expect_same_device(*t, k);
        expect_last_dim_contiguous(*t);
    }
    p.cos = cos.data;
    p.sin = sin.data;
    p.cos_stride = cos.stride(0);
    p.sin_stride = sin.stride(0);
    p.table_dtype = cos.dtype;
    p.rotary_dim = int(cos.size(1) * 2);
}

static void set_queries(CacheAppendParams& p, const Tensor& q, const Tensor& q_out,
                        const Tensor& k) {
    if (!q.given) return;
    if (q.ndim != 4 || q.size(0) != k.size(0) || q.size(3) != k.size(3))
        value_error(q, "must have shape (batch, seqlen_q, num_heads, head_dim) as k",
                    shape_text(q));
    expect_heads_like(q, k);
    expect_same_shape(q_out, q);
    expect_heads_like(q_out, k);
    p.q = heads_view(q);
    p.q_out = heads_view(q_out);
    p.seqlen_q = as_int(q, q.size(1));
    p.num_heads = as_int(q, q.size(2));
}

static bool kv_cache_append(py::handle q_, py::handle q_out_, py::handle k_, py::handle v_,
                            py::handle k_cache_, py::handle v_cache_, py::handle cache_seqlens_,
                            py::handle block_table_, py::handle cos_, py::handle sin_,
                            bool interleaved, bool one_position) {
    const char* op = "kv_cache_append";
    Tensor q(op, "q", q_, true), q_out(op, "q_out", q_out_, !q.given), k(op, "k", k_);
    Tensor v(op, "v", v_), k_cache(op, "k_cache", k_cache_), v_cache(op, "v_cache", v_cache_);
    Tensor cache_seqlens(op, "cache_seqlens", cache_seqlens_), cos(op, "cos", cos_, true);
    Tensor block_table(op, "block_table", block_table_, true), sin(op, "sin", sin_, !cos.given);
    AttentionParams shapes = check_qkv(k, k_cache, v_cache, 4, block_table.given);
    if (k_cache.size(2) != k.size(2))
        value_error(k_cache, "must have the num_heads_k of k (" + std::to_string(k.size(2)) + ")",
                    std::to_string(k_cache.size(2)));
    expect_same_shape(v, k);
    expect_heads_like(v, k);
    set_pages(shapes, block_table, k, k_cache);
    const int longest = shapes.seqlen_k - shapes.seqlen_q;
    if (longest < 0)
        value_error(k, "must fit the cache of " + std::to_string(shapes.seqlen_k) + " tokens",
                    shape_text(k));
    check_cache_seqlens(cache_seqlens, k, longest);
    CacheAppendParams p{};
    p.k = heads_view(k);
    p.v = heads_view(v);
    p.k_cache = shapes.k;
    p.v_cache = shapes.v;
    p.cache_seqlens = cache_seqlens.ptr<int32_t>();
    p.block_table = shapes.block_table;
    p.block_table_stride = shapes.block_table_stride;
    p.page_size = shapes.page_size;
    p.interleaved = interleaved;
    p.one_position = one_position;
    p.batch = shapes.batch;
    p.seqlen_new = shapes.seqlen_q;
    p.capacity = shapes.seqlen_k;
    p.num_heads_k = shapes.num_heads_k;
    p.head_dim = shapes.head_dim;
    p.dtype = shapes.dtype;
    set_queries(p, q, q_out, k);
    set_rotation(p, cos, sin, k);
    if (!has_kernel(k)) return false;
    shapes.cache_seqlens = p.cache_seqlens;
    check_pages(shapes, block_table, k_cache, p.seqlen_new);
    return run(
        k, [&](Stream stream) { return launch_cache_append(p, stream); },
        [&] { dispatch_isa([&]<class Isa>() { cache_append_cpu<Isa>(p); }); });
}

static const Binding binding([](py::module_& m) {
    m.def("kv_cache_append", &kv_cache_append);
    m.def("attention_decode", &attention_decode);
    m.def("attention_decode_splits", &decode_splits);
});

}  // namespace vlmkernels
