// Statistics and gradients of rows of products, in one or two passes while they are in the cache.
// Strips of kStrip columns go to threads for CLIP, whose columns have statistics too; rows for the
// rest. No result depends on the number of threads.
#include <cmath>
#include <limits>

#include "common/simd.h"
#include "contrastive_loss/contrastive_loss.h"

namespace vlmkernels {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kMaxSpread = 80;  // exp() of a larger distance may be 0

VLMKERNELS_INLINE Vec abs(Vec x) { return (Vec)((Bits)x & 0x7fffffff); }
VLMKERNELS_INLINE float max_of(Vec x) {
    float y = x[0];
    for (int i = 1; i < kWidth; ++i) y = x[i] > y ? x[i] : y;
    return y;
}
VLMKERNELS_INLINE float min_of(Vec x) { return -max_of(-x); }

// log1p(e) for 0 <= e <= 1: minimax polynomial of log1p(e) / e, relative error 3e-8.
VLMKERNELS_INLINE Vec log1p_unit(Vec e) {
    Vec y = e * 0.00523268012f - 0.0295051876f;
    y = y * e + 0.0782258809f;
    y = y * e - 0.136632413f;
    y = y * e + 0.191060051f;
    y = y * e - 0.24842982f;
    y = y * e + 0.333190978f;
    y = y * e - 0.499994934f;
    y = y * e + 0.99999994f;
    return y * e;
}

// n products from column on, as logits; lanes from n on hold `fill`.
template <class T>
VLMKERNELS_INLINE Vec logits(const T* x, int64_t n, float scale, float bias, float fill) {
    if (n >= kWidth) return load(x) * scale + bias;
    return lanes_below(n) ? load_first(x, n) * scale + bias : splat(fill);
}

template <class T>
struct Strip {
    const T* x;  // first product of the strip in row 0
    int64_t stride, num_rows, columns;
    float scale;

    VLMKERNELS_INLINE Vec at(int64_t row, int64_t column, float fill = -kInfinity) const {
        return logits(x + row * stride + column, columns - column, scale, 0, fill);
    }
    float row_max(int64_t row, float fill) const {
        Vec y = splat(fill);
        for (int64_t j = 0; j < columns; j += kWidth) y = max(y, at(row, j, fill));
        return max_of(y);
    }
};

// Adds a strip's column sums, of exp(s - strip_max), to those of the rows before.
VLMKERNELS_INLINE void merge(float* max_, float* sum_, int64_t n, Vec strip_max, Vec strip_sum) {
    const Vec before = load_first(max_, n), now = max(before, strip_max);
    const Vec offset = now == splat(-kInfinity) ? Vec{} : now;
    const Vec sum =
        load_first(sum_, n) * exp(before - offset) + strip_sum * exp(strip_max - offset);
    store_first(max_, now, n);
    store_first(sum_, sum, n);
}

// Log-sum-exp of a row is part_max + log(part_sum) for now. One exponential serves row and column.
template <class T>
void strip_from_one_max(const Strip<T>& s, float high, float* part_max, float* part_sum,
                        float* text_max, float* text_sum) {
    alignas(64) float column_sums[kStrip] = {};
    for (int64_t i = 0; i < s.num_rows; ++i) {
        Vec row_sum{};
        for (int64_t j = 0; j < s.columns; j += kWidth) {
            const Vec e = exp(s.at(i, j) - high);
            row_sum += e;
            store(column_sums + j, load(column_sums + j) + e);
        }
        part_max[i] = high;
        part_sum[i] = sum(row_sum);
    }
    for (int64_t j = 0; j < s.columns; j += kWidth)
        merge(text_max + j, text_sum + j, s.columns - j, splat(high), load(column_sums + j));
}

// Each row and each column from its own maximum.
template <class T>
void strip_from_all_max(const Strip<T>& s, float* part_max, float* part_sum, float* text_max,
                        float* text_sum) {
    for (int64_t i = 0; i < s.num_rows; ++i) {
        const float high = s.row_max(i, -kInfinity), offset = high == -kInfinity ? 0 : high;
        Vec row_sum{};
        for (int64_t j = 0; j < s.columns; j += kWidth) row_sum += exp(s.at(i, j) - offset);
        part_max[i] = high;
        part_sum[i] = sum(row_sum);
    }
    for (int64_t j = 0; j < s.columns; j += kWidth) {
        Vec high = splat(-kInfinity), column_sum{};
        for (int64_t i = 0; i < s.num_rows; ++i) high = max(high, s.at(i, j));
        const Vec offset = high == splat(-kInfinity) ? Vec{} : high;
        for (int64_t i = 0; i < s.num_rows; ++i) column_sum += exp(s.at(i, j) - offset);
        merge(text_max + j, text_sum + j, s.columns - j, high, column_sum);
    }
}

template <class T>
void clip_strip(const ClipRowsParams& p, int64_t strip) {
    const int64_t first = strip * kStrip, rows = p.x.num_rows, n = p.x.num_texts;
    const Strip<T> s{static_cast<const T*>(p.x.products) + first, n, rows,
                     n - first < kStrip ? n - first : kStrip, *p.x.logit_scale};
    float* part_max = p.workspace + strip * rows;
    float* part_sum = part_max + num_strips(n) * rows;
    float high = -kInfinity, low = kInfinity;
    for (int64_t i = 0; i < rows; ++i) {
        const float fill = to_float(s.x[i * n]) * s.scale;
        Vec row_max = splat(fill), row_min = row_max;
        for (int64_t j = 0; j < s.columns; j += kWidth) {
            const Vec x = s.at(i, j, fill);
            row_max = max(row_max, x), row_min = min(row_min, x);
        }
        const float most = max_of(row_max), least = min_of(row_min);
        high = most > high ? most : high;
        low = least < low ? least : low;
    }
    if (high - low <= kMaxSpread)
        strip_from_one_max(s, high, part_max, part_sum, p.text_max + first, p.text_sum + first);
    else
        strip_from_all_max(s, part_max, part_sum, p.text_max + first, p.text_sum + first);
}

// The parts of a row, in order, to its maximum and the logarithm of its sum.
void row_lse(const float* part_max, const float* part_sum, int64_t num_parts, int64_t stride,
             float* row_max, float* row_log) {
    float high = -kInfinity;
    double total = 0;
    for (int64_t i = 0; i < num_parts; ++i)
        high = part_max[i * stride] > high ? part_max[i * stride] : high;
    const float offset = high == -kInfinity ? 0 : high;
    for (int64_t i = 0; i < num_parts; ++i)
        total += double(part_sum[i * stride]) * std::exp(part_max[i * stride] - offset);
    *row_max = offset;
    *row_log = float(std::log(total));
}

template <class T>
float siglip_row(const ContrastiveProducts& p, int64_t row) {
    const T* x = static_cast<const T*>(p.products) + row * p.num_texts;
    const float scale = *p.logit_scale, bias = p.logit_bias ? *p.logit_bias : 0;
    const int64_t positive = p.first_positive + row;
    double total = 0;
    for (int64_t first = 0; first < p.num_texts; first += kStrip) {
        const int64_t end = first + kStrip < p.num_texts ? first + kStrip : p.num_texts;
        Vec loss{};
        for_each_vector(first, end, [&](int64_t j, int count) VLMKERNELS_INLINED {
            const Vec logit = logits(x + j, count, scale, bias, -kInfinity);
            const Vec s = lane_is(positive < end ? positive - j : -1) ? -logit : logit;
            loss += max(Vec{}, s) + log1p_unit(exp(-abs(s)));  // softplus; a NaN stays
        });
        total += double(sum(loss));
    }
    return float(total);
}

template <class T, bool kSigmoid>
void gradient_row(const ContrastiveGradientRowsParams& p, int64_t row) {
    const int64_t n = p.x.num_texts, positive = p.x.first_positive + row;
    const T* x = static_cast<const T*>(p.x.products) + row * n;
    T* to = static_cast<T*>(p.ds) + row * n;
    const float scale = *p.x.logit_scale, bias = p.x.logit_bias ? *p.x.logit_bias : 0;
    const float row_max = kSigmoid ? 0 : p.image_lse[row];
    const float row_log = kSigmoid ? 0 : p.image_lse[p.x.num_rows + row];
    const float factor = *p.factor;
    // The positive's, subtracted in fp32 before ds is rounded.
    const float share = p.image_weight + p.text_weight;
    double by_product = 0, total = 0;
    for (int64_t first = 0; first < n; first += kStrip) {
        const int64_t end = first + kStrip < n ? first + kStrip : n;
        Vec strip_by_product{}, strip{};
        for_each_vector(first, end, [&](int64_t j, int left) VLMKERNELS_INLINED {
            const Vec product = load_first(x + j, left), s = product * scale + bias;
            Vec ds;
            if constexpr (kSigmoid) {
                // sigmoid(s), of the positive -sigmoid(-s): sigmoid(s) - 1 would cancel.
                const Vec e = exp(-abs(s)), one = splat(1);
                ds = lane_is(positive - j) ? -(s < 0 ? one : e) : (s < 0 ? e : one);
                ds *= reciprocal(1 + e);
            } else {
                const float* text = p.text_lse + j;
                ds = exp(s - row_max - row_log) * p.image_weight +
                     exp(s - load_first(text, left) - load_first(text + n, left)) * p.text_weight;
                ds -= lane_is(positive - j) ? splat(share) : Vec{};
            }
            if (left < kWidth) ds = lanes_below(left) ? ds : Vec{};
            strip_by_product += ds * product;
            strip += ds;
            store_first(to + j, ds * factor, left);
        });
        by_product += double(sum(strip_by_product));
        total += double(sum(strip));
    }
    p.sums[row] = float(by_product);
    p.sums[p.x.num_rows + row] = float(total);
}

int64_t rows_at_once(int64_t num_texts) { return 1 + (1 << 15) / (num_texts + 1); }

}  // namespace

template <class Isa>
void clip_rows_cpu(const ClipRowsParams& p) {
    const int64_t strips = num_strips(p.x.num_texts), rows = p.x.num_rows;
    dispatch_float(p.x.dtype, [&]<class T>() {
        parallel_for(strips, 1 + (1 << 15) / (kStrip * rows), [&](int64_t begin, int64_t end) {
            for (int64_t strip = begin; strip < end; ++strip) clip_strip<T>(p, strip);
        });
        const T* x = static_cast<const T*>(p.x.products);
        for (int64_t i = 0; i < rows; ++i) {
            const int64_t positive = p.x.first_positive + i;
            row_lse(p.workspace + i, p.workspace + strips * rows + i, strips, rows, p.image_max + i,
                    p.image_log + i);
            if (p.positive && positive >= 0 && positive < p.x.num_texts)
                p.positive[i] = to_float(x[i * p.x.num_texts + positive]) * *p.x.logit_scale;
        }
    });
}

template <class Isa>
void siglip_rows_cpu(const SiglipRowsParams& p) {
    dispatch_float(p.x.dtype, [&]<class T>() {
        parallel_for(p.x.num_rows, rows_at_once(p.x.num_texts), [&](int64_t begin, int64_t end) {
            for (int64_t row = begin; row < end; ++row) p.losses[row] = siglip_row<T>(p.x, row);
        });
    });
}

template <class Isa>
void contrastive_gradient_rows_cpu(const ContrastiveGradientRowsParams& p) {
    dispatch_float(p.x.dtype, [&]<class T>() {
        parallel_for(p.x.num_rows, rows_at_once(p.x.num_texts), [&](int64_t begin, int64_t end) {
            for (int64_t row = begin; row < end; ++row)
                p.image_lse ? gradient_row<T, false>(p, row) : gradient_row<T, true>(p, row);
        });
    });
}

template void clip_rows_cpu<VLMKERNELS_ISA>(const ClipRowsParams& p);
template void siglip_rows_cpu<VLMKERNELS_ISA>(const SiglipRowsParams& p);
template void contrastive_gradient_rows_cpu<VLMKERNELS_ISA>(const ContrastiveGradientRowsParams& p);

}  // namespace vlmkernels
