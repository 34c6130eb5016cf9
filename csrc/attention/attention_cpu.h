// What the CPU attention kernels share. Scores are computed transposed, one column of a tile for
// each query row: the running maximum and sum of the softmax, masks and rescaling are then plain
// vector operations, keys and values are broadcast operands that need no packing, and neither the
// number of keys nor head_dim is padded. The query heads that share a key head are rows of one
// problem: row = token * group + head.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <new>
#include <vector>

#include "attention/attention.h"
#include "common/gemm_cpu.h"

namespace vlmkernels {
namespace {

typedef int32_t Ints __attribute__((vector_size(kWidth * 4)));

constexpr int64_t kPanelRows = kTileCols * kWidth;  // query rows whose scores are one tile wide
constexpr int64_t kMostLanes = 64;                  // of any panel
constexpr int64_t kBlockKeys = 64;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Not those of std: of a template over built-in types the linker keeps one copy for all instruction
// sets if the compiler does not inline it (see isa.h). Over the types here each file has its own.
template <class T>
void fill(T* begin, T* end, T value) {
    for (; begin < end; ++begin) *begin = value;
}
inline int64_t clamp(int64_t x, int64_t low, int64_t high) {
    return x < low ? low : x > high ? high : x;
}

// Memory that is aligned for vectors; not initialised.
class Buffer {
  public:
    explicit Buffer(int64_t size) : data_(new (std::align_val_t(64)) float[size]) {}
    Buffer(const Buffer&) = delete;
    ~Buffer() { operator delete[](data_, std::align_val_t(64)); }
    float* data() { return data_; }

  private:
    float* data_;
};

// A run of keys, [begin, end); empty if end <= begin.
struct Span {
    int64_t begin, end;
    int64_t size() const { return end > begin ? end - begin : 0; }
};

// The query rows of one sequence that see one key head, of all heads that share it or of some, and
// the keys they see.
struct Problem {
    const AttentionParams& p;
    int64_t sequence, head_k, group, first_head;
    int64_t q_begin, seqlen_q, k_begin, seqlen_k;

    Problem(const AttentionParams& p, int64_t sequence, int64_t head_k)
        : Problem(p, sequence, head_k, head_k * (p.num_heads / p.num_heads_k),
                  p.num_heads / p.num_heads_k) {}
    Problem(const AttentionParams& p, int64_t sequence, int64_t head_k, int64_t first_head,
            int64_t heads)
        : p(p), sequence(sequence), head_k(head_k), group(heads), first_head(first_head) {
        const bool packed = p.cu_seqlens_q;
        q_begin = packed ? p.cu_seqlens_q[sequence] : 0;
        k_begin = packed ? p.cu_seqlens_k[sequence] : 0;
        seqlen_q = packed ? p.cu_seqlens_q[sequence + 1] - q_begin : p.seqlen_q;
        seqlen_k = packed ? p.cu_seqlens_k[sequence + 1] - k_begin : p.seqlen_k;
        if (p.cache_seqlens) seqlen_k = p.cache_seqlens[sequence];
    }

    int64_t rows() const { return seqlen_q * group; }
    // Calls f(lane, token, head) for rows [begin, begin + n).
    template <class F>
    void for_rows(int64_t begin, int64_t n, F&& f) const {
        int64_t token = begin / group, head = begin % group;
        for (int64_t lane = 0; lane < n; ++lane) {
            f(lane, token, head);
            if (++head == group) head = 0, ++token;
        }
    }
    template <class T>
    T* query(const HeadsView& view, int64_t token, int64_t head) const {
        return static_cast<T*>(view.data) + sequence * view.batch_stride +
               (q_begin + token) * view.token_stride + (first_head + head) * view.head_stride;
    }
    template <class T>
    T* key(const HeadsView& view, int64_t token) const {
        int64_t row = sequence;
        if (p.block_table) {
            row = p.block_table[sequence * p.block_table_stride + token / p.page_size];
            token %= p.page_size;
        }
        return static_cast<T*>(view.data) + row * view.batch_stride +
               (k_begin + token) * view.token_stride + head_k * view.head_stride;
    }
    // How many of `keys` keys from `token` on lie token_stride apart.
    int64_t keys_in_page(int64_t token, int64_t keys) const {
        return p.block_table ? std::min(keys, p.page_size - token % p.page_size) : keys;
    }
    // Where lse, and what is laid out like it, holds a row.
    int64_t lse_index(int64_t token, int64_t head) const {
        return sequence * p.lse_batch_stride + (first_head + head) * p.lse_head_stride + q_begin +
               token;
    }
    // The keys in the window of a token.
    Span window(int64_t token) const {
        if (p.spans) {
            const int32_t* span = ids_q(p.spans, 2) + token * 2;
            const int64_t begin = clamp(span[0], 0, seqlen_k);
            return {begin, clamp(span[1], begin, seqlen_k)};
        }
        const int64_t diagonal = token + seqlen_k - seqlen_q;
        return {p.window_left < 0 ? 0 : clamp(diagonal - p.window_left, 0, seqlen_k),
                p.window_right < 0 ? seqlen_k : clamp(diagonal + p.window_right + 1, 0, seqlen_k)};
    }
    // Keys that rows [begin, end) may see: windows move on with the token, images are anywhere.
    Span keys_of(int64_t begin, int64_t end) const {
        if (p.images.q) return {0, seqlen_k};
        if (p.spans) return union_of_spans(begin / group, (end - 1) / group);
        return {window(begin / group).begin, window((end - 1) / group).end};
    }
    const int32_t* ids_q(const int32_t* ids, int64_t size = 1) const {  // of the first token
        return ids ? ids + (p.cu_seqlens_q ? q_begin : sequence * p.seqlen_q) * size : nullptr;
    }
    const int32_t* ids_k(const int32_t* ids) const {
        return ids ? ids + (p.cu_seqlens_q ? k_begin : sequence * p.seqlen_k) : nullptr;
    }

  private:
    Span union_of_spans(int64_t first, int64_t last) const {
        Span all = {seqlen_k, 0};
        for (int64_t token = first; token <= last; ++token) {
            const Span span = window(token);
            if (span.size() == 0) continue;
            all = {std::min(all.begin, span.begin), std::max(all.end, span.end)};
        }
        return all.begin < all.end ? all : Span{0, 0};
    }
};

// A range of the rows of a problem: what a thread takes at a time.
struct Item {
    int32_t sequence, head_k;
    int64_t begin, end;
    double cost;  // scores to compute
};

// Cuts all problems into items of at most max_rows rows (a multiple of kWidth), costliest first.
inline std::vector<Item> make_items(const AttentionParams& p, int64_t max_rows) {
    std::vector<Item> items;
    for (int sequence = 0; sequence < p.batch; ++sequence) {
        const Problem problem(p, sequence, 0);
        const int64_t rows = problem.rows(), parts = ceil_div(rows, max_rows);
        if (rows == 0) continue;
        const int64_t step = round_up(ceil_div(rows, parts), kWidth);
        for (int head_k = 0; head_k < p.num_heads_k; ++head_k)
            for (int64_t begin = 0; begin < rows; begin += step) {
                const int64_t end = std::min(begin + step, rows);
                const int64_t keys = (problem.keys_of(begin, begin + 1).size() +
                                      problem.keys_of(end - 1, end).size()) /
                                     2;
                items.push_back({sequence, head_k, begin, end, double(end - begin) * double(keys)});
            }
    }
    std::stable_sort(items.begin(), items.end(),
                     [](const Item& a, const Item& b) { return a.cost > b.cost; });
    return items;
}

// How many items a thread should get at least for a second thread to be worth its start; cost(item)
// is in scores.
template <class Items, class Cost>
int64_t grain_of(const Items& items, int64_t head_dim, Cost&& cost) {
    double all = 0;
    for (const auto& item : items) all += double(cost(item)) * double(head_dim);
    const double per_thread = 1 << 16;
    return std::max<int64_t>(1, int64_t(per_thread * double(items.size()) / (all + 1)));
}
template <class Items>
int64_t grain_of(const Items& items, int64_t head_dim) {
    return grain_of(items, head_dim, [](const auto& item) { return item.cost; });
}

// parallel_take with f(take, memory): `size` floats for each thread. They are allocated before the
// threads start, as an exception (out of memory) cannot leave a parallel region.
template <class F>
void parallel_take(int64_t n, int64_t grain, int64_t size, F&& f) {
    const int64_t threads = std::min(max_threads(), ceil_div(n, grain));
    size = round_up(size, 16);  // stay aligned
    Buffer memory(threads * size);
    std::atomic<int64_t> started{0};
    parallel_take(n, grain, [&](auto&& take) {
        f(take, memory.data() + started.fetch_add(1, std::memory_order_relaxed) * size);
    });
}

// to[head_dim] = from, as floats; zero from there to a multiple of kWidth.
template <class T>
VLMKERNELS_INLINE void copy_row(float* to, const T* from, int64_t head_dim) {
    int64_t d = 0;
    for (; d + kWidth <= head_dim; d += kWidth) store(to + d, load(from + d));
    if (d < head_dim) store(to + d, load_first(from + d, head_dim - d));
}

// Keys or values from `first` on as floats, then rows of zeros up to a multiple of kTileRows.
template <class T>
void copy_keys(float* to, int64_t ld, const Problem& problem, const HeadsView& view, int64_t first,
               int64_t n) {
    for (int64_t at = 0, end; at < n; at = end) {
        end = at + problem.keys_in_page(first + at, n - at);
        const T* from = problem.key<const T>(view, first + at);
        for (int64_t i = at; i < end; ++i, from += view.token_stride)
            copy_row(to + i * ld, from, problem.p.head_dim);
    }
    fill(to + n * ld, to + round_up(n, kTileRows) * ld, 0.f);
}

// to[d] = scale * from[d].
template <class T>
VLMKERNELS_INLINE void store_row(T* to, const float* from, int64_t head_dim, float scale) {
    for (int64_t d = 0; d < head_dim; d += kWidth)
        store_first(to + d, load(from + d) * scale, head_dim - d);
}

// to[d, lane] = rows[lane][d] for `lanes` columns, a multiple of kWidth, of which n exist;
// the others become zero. `to` has room for head_dim rounded up to kWidth.
template <class T>
void transpose_in(float* to, int64_t lanes, int64_t n, int64_t head_dim, const T* const* rows) {
    for (int64_t lane = 0; lane < lanes; lane += kWidth)
        for (int64_t d = 0; d < head_dim; d += kWidth) {
            Vec m[kWidth];
            for (int i = 0; i < kWidth; ++i)
                m[i] = lane + i < n ? load_first(rows[lane + i] + d, head_dim - d) : Vec{};
            transpose(m);
            for (int i = 0; i < kWidth; ++i) store(to + (d + i) * lanes + lane, m[i]);
        }
}

// The reverse: rows[lane][d] = scale[lane] * from[d, lane].
template <class T>
void transpose_out(const float* from, int64_t lanes, int64_t n, int64_t head_dim,
                   const float* scale, T* const* rows) {
    for (int64_t lane = 0; lane < n; lane += kWidth)
        for (int64_t d = 0; d < head_dim; d += kWidth) {
            Vec m[kWidth];
            const Vec factor = load(scale + lane);
            for (int i = 0; i < kWidth; ++i) m[i] = load(from + (d + i) * lanes + lane) * factor;
            transpose(m);
            for (int i = 0; i < kWidth && lane + i < n; ++i)
                store_first(rows[lane + i] + d, m[i], head_dim - d);
        }
}

// Calls f.template operator()<cols>().
template <class F>
void dispatch_cols(int64_t cols, F&& f) {
    static_assert(kTileCols == 3);
    if (cols == 3) return f.template operator()<3>();
    if (cols == 2) return f.template operator()<2>();
    return f.template operator()<1>();
}

}  // namespace
}  // namespace vlmkernels
