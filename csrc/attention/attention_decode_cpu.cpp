// Decoding: few query rows against long caches, bound by reading the cache. Keys and values are
// read once, in place, with head_dim along the vectors. The keys are cut into slices so that all
// threads read; the slices of a problem are merged in order.
#include <optional>

#include "attention/attention_mask_cpu.h"

namespace vlmkernels {
namespace {

constexpr int64_t kMostRows = 16;  // of a problem; from there on the forward is faster
constexpr int64_t kLeastSliceKeys = 256;
constexpr int64_t kMostSlices = 32;  // of a problem
constexpr int kValueCols = kWidth == 16 ? 4 : 2;

struct Slice {
    int32_t sequence, head_k;
    int64_t begin, end;                    // keys
    float* out;                            // [rows, ld], to be divided by sum
    float max[kMostRows], sum[kMostRows];  // of the scaled scores
};

// scores[row, key] = q[row] . k[key]. Writes whole vectors: up to kWidth - 1 scores too many.
template <int kRows, class T>
void score_keys(const T* k, int64_t stride, int64_t keys, const float* q, int64_t ld,
                int64_t head_dim, float* scores) {
    constexpr int kKeys = kWidth / kRows;
    for (int64_t key = 0; key < keys; key += kKeys) {
        const T* rows[kKeys];
        for (int i = 0; i < kKeys; ++i) rows[i] = k + std::min(key + i, keys - 1) * stride;
        Vec products[kWidth] = {};
        auto multiply = [&](int64_t d, auto&& read) __attribute__((always_inline)) {
#pragma GCC unroll 16
            for (int i = 0; i < kKeys; ++i) {
                const Vec x = read(rows[i] + d);
#pragma GCC unroll 16
                for (int r = 0; r < kRows; ++r) products[r * kKeys + i] += x * load(q + r * ld + d);
            }
        };
        int64_t d = 0;
        for (; d + kWidth <= head_dim; d += kWidth) multiply(d, [](const T* p) { return load(p); });
        if (d < head_dim) multiply(d, [&](const T* p) { return load_first(p, head_dim - d); });
        const Vec sums = row_sums(products);
        for (int r = 0; r < kRows; ++r)
            std::memcpy(scores + r * kBlockKeys + key,
                        reinterpret_cast<const float*>(&sums) + r * kKeys, kKeys * 4);
    }
}

// out[row] = out[row] * rescale[row] + sum over keys of p[row, key] v[key], for some columns.
template <int kRows, int kCols, class T, class Read>
VLMKERNELS_INLINE void add_columns(const T* v, int64_t stride, int64_t keys, const float* p,
                                   const float* rescale, float* out, int64_t ld, Read&& read) {
    Vec total[kRows][kCols] = {};
    for (int64_t key = 0; key < keys; ++key) {
        Vec x[kCols];
#pragma GCC unroll 4
        for (int c = 0; c < kCols; ++c) x[c] = read(v + key * stride + c * kWidth);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
            for (int c = 0; c < kCols; ++c) total[r][c] += x[c] * p[r * kBlockKeys + key];
    }
    for (int r = 0; r < kRows; ++r)
        for (int c = 0; c < kCols; ++c) {
            float* at = out + r * ld + c * kWidth;
            store(at, load(at) * rescale[r] + total[r][c]);
        }
}

template <int kRows, class T>
void add_values(const T* v, int64_t stride, int64_t keys, const float* p, const float* rescale,
                float* out, int64_t ld, int64_t head_dim) {
    auto whole = [](const T* at) { return load(at); };
    int64_t d = 0;
    for (; d + kValueCols * kWidth <= head_dim; d += kValueCols * kWidth)
        add_columns<kRows, kValueCols>(v + d, stride, keys, p, rescale, out + d, ld, whole);
    for (; d + kWidth <= head_dim; d += kWidth)
        add_columns<kRows, 1>(v + d, stride, keys, p, rescale, out + d, ld, whole);
    if (d < head_dim)
        add_columns<kRows, 1>(v + d, stride, keys, p, rescale, out + d, ld,
                              [&](const T* at) { return load_first(at, head_dim - d); });
}

// Calls f.template operator()<n>(first) for rows [first, first + n) until all are covered.
template <class F>
void dispatch_rows(int64_t rows, F&& f) {
    int64_t first = 0;
    for (; first + 4 <= rows; first += 4) f.template operator()<4>(first);
    if (first + 2 <= rows) f.template operator()<2>(first), first += 2;
    if (first < rows) f.template operator()<1>(first);
}

// softcap tanh(scale scores / softcap).
void cap_row(float* scores, int64_t keys, float scale, float softcap) {
    for (int64_t key = 0; key < keys; key += kWidth)
        store(scores + key, tanh(load(scores + key) * (scale / softcap)) * softcap);
}

// Scores of one row become probabilities relative to the maximum so far, those of keys outside of
// `visible` 0. Returns by what everything before must be multiplied.
float softmax_row(float* scores, int64_t keys, Span visible, float scale, float& max_so_far,
                  float& total) {
    const int64_t end = round_up(keys, kWidth);
    fill(scores, scores + clamp(visible.begin, 0, keys), -kInfinity);
    fill(scores + clamp(visible.end, 0, keys), scores + end, -kInfinity);
    Vec most = splat(-kInfinity);
    for (int64_t key = 0; key < end; key += kWidth) most = max(most, load(scores + key));
    const float before = max_so_far;
    for (int i = 0; i < kWidth; ++i) max_so_far = std::max(max_so_far, most[i] * scale);
    const float base = max_so_far == -kInfinity ? 0 : max_so_far;
    Vec sums{};
    for (int64_t key = 0; key < end; key += kWidth) {
        const Vec probability = exp(load(scores + key) * scale - base);
        store(scores + key, probability);
        sums += probability;
    }
    const float rescale = exp(splat(before - base))[0];
    total = total * rescale + sum(sums);
    return rescale;
}

template <class T>
class Decode {
  public:
    explicit Decode(const AttentionParams& p)
        : p_(p),
          ld_(round_up(p.head_dim, kWidth)),
          rows_(p.seqlen_q * (p.num_heads / p.num_heads_k)) {
        make_slices();
        buffer_.emplace(int64_t(slices_.size()) * rows_ * ld_);
        for (size_t i = 0; i < slices_.size(); ++i)
            slices_[i].out = buffer_->data() + int64_t(i) * rows_ * ld_;
    }

    void run() {
        const int64_t grain = grain_of(slices_, p_.head_dim, [this](const Slice& slice) {
            return Span{slice.begin, slice.end}.size() * rows_;
        });
        parallel_take(int64_t(slices_.size()), grain, rows_ * (ld_ + kBlockKeys),
                      [&](auto&& take, float* memory) {
                          for (int64_t i; (i = take()) >= 0;) run_slice(slices_[i], memory);
                      });
        for (size_t first = 0, end; first < slices_.size(); first = end) {
            end = first + 1;
            while (end < slices_.size() && slices_[end].sequence == slices_[first].sequence &&
                   slices_[end].head_k == slices_[first].head_k)
                ++end;
            finish(&slices_[first], &slices_[end]);
        }
    }

  private:
    // At least one slice for each problem, those of a problem side by side. Where a row is cut
    // depends on its own length only, so that its result does, too.
    void make_slices() {
        for (int i = 0; i < p_.batch; ++i) {
            const Span keys = Problem(p_, i, 0).keys_of(0, rows_);
            const int64_t first = keys.begin / kBlockKeys * kBlockKeys;
            const int64_t parts = ceil_div(keys.end - first, kMostSlices);
            const int64_t step = round_up(std::max(parts, kLeastSliceKeys), kBlockKeys);
            for (int head_k = 0; head_k < p_.num_heads_k; ++head_k)
                for (int64_t key = first; key == first || key < keys.end; key += step)
                    slices_.push_back({i, head_k, key, std::min(key + step, keys.end)});
        }
    }

    void run_slice(Slice& slice, float* q) {
        const Problem problem(p_, slice.sequence, slice.head_k);
        float* scores = q + rows_ * ld_;
        problem.for_rows(0, rows_, [&](int64_t row, int64_t token, int64_t head) {
            copy_row(q + row * ld_, problem.query<const T>(p_.q, token, head), p_.head_dim);
        });
        fill(slice.max, slice.max + rows_, -kInfinity);
        fill(slice.sum, slice.sum + rows_, 0.f);
        fill(slice.out, slice.out + rows_ * ld_, 0.f);
        for (int64_t key = slice.begin, keys; key < slice.end; key += keys) {
            keys = problem.keys_in_page(key, std::min(kBlockKeys, slice.end - key));
            run_block(problem, slice, key, keys, q, scores);
        }
    }

    void run_block(const Problem& problem, Slice& slice, int64_t key, int64_t keys, const float* q,
                   float* scores) {
        const T *k = problem.key<const T>(p_.k, key), *v = problem.key<const T>(p_.v, key);
        float rescale[kMostRows];
        dispatch_rows(rows_, [&]<int kRows>(int64_t row) {
            score_keys<kRows>(k, p_.k.token_stride, keys, q + row * ld_, ld_, p_.head_dim,
                              scores + row * kBlockKeys);
        });
        problem.for_rows(0, rows_, [&](int64_t row, int64_t token, int64_t) {
            float* of_row = scores + row * kBlockKeys;
            if (p_.softcap > 0) cap_row(of_row, keys, p_.softmax_scale, p_.softcap);
            const Span window = problem.window(token);
            rescale[row] =
                softmax_row(of_row, keys, {window.begin - key, window.end - key},
                            p_.softcap > 0 ? 1 : p_.softmax_scale, slice.max[row], slice.sum[row]);
        });
        dispatch_rows(rows_, [&]<int kRows>(int64_t row) {
            add_values<kRows>(v, p_.v.token_stride, keys, scores + row * kBlockKeys, rescale + row,
                              slice.out + row * ld_, ld_, p_.head_dim);
        });
    }

    // Merges the slices of a problem into the first one and writes out and lse.
    void finish(Slice* first, const Slice* end) {
        const Problem problem(p_, first->sequence, first->head_k);
        problem.for_rows(0, rows_, [&](int64_t row, int64_t token, int64_t head) {
            float most = -kInfinity, total = 0;
            for (const Slice* s = first; s < end; ++s) most = std::max(most, s->max[row]);
            const float base = most == -kInfinity ? 0 : most;
            float* out = first->out + row * ld_;
            for (const Slice* s = first; s < end; ++s) {
                const float weight = std::exp(s->max[row] - base);
                const float* part = s->out + row * ld_;
                total += s->sum[row] * weight;
                for (int64_t d = 0; d < ld_; ++d)
                    out[d] = part[d] * weight + (s == first ? 0 : out[d]);
            }
            store_row(problem.query<T>(p_.out, token, head), out, p_.head_dim,
                      total == 0 ? 0 : 1 / total);
            p_.lse[problem.lse_index(token, head)] = most + std::log(total);
        });
    }

    const AttentionParams& p_;
    const int64_t ld_, rows_;
    std::vector<Slice> slices_;
    std::optional<Buffer> buffer_;
};

}  // namespace

template <class Isa>
void attention_decode_cpu(const AttentionParams& p) {
    const int64_t rows = int64_t(p.seqlen_q) * (p.num_heads / p.num_heads_k);
    if (rows == 0) return;
    if (rows > kMostRows) return attention_fwd_cpu<Isa>(p);
    dispatch_float(p.dtype, [&]<class T>() { Decode<T>(p).run(); });
}

template void attention_decode_cpu<VLMKERNELS_ISA>(const AttentionParams& p);

}  // namespace vlmkernels
