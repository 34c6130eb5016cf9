// A row at a time, in fp32: one pass over it for the statistics, one for the result.
#include <cmath>
#include <type_traits>

#include "common/column_sums_cpu.h"
#include "common/simd.h"
#include "norm/norm.h"

namespace vlmkernels {
namespace {

constexpr int kBlock = 16 * kWidth;  // elements

struct Moments {
    float mean, variance;
};

// Each lane for itself: the mean of a block first, then its squared deviations, then both are added
// to those of the blocks before as Chan, Golub and LeVeque do: no digits are lost where rows drift.
template <class T>
Moments moments_of(const T* x, int n) {
    Vec total{}, mean{}, squares{};
    int done = 0;  // vectors
    const int vectors = n / kWidth;
    while (done < vectors) {
        const int count = vectors - done < 16 ? vectors - done : 16;
        const T* block = x + done * kWidth;
        Vec sums[4] = {}, deviations[4] = {};
        int i = 0;
        for (; i + 4 <= count; i += 4)
            for (int j = 0; j < 4; ++j) sums[j] += load(block + (i + j) * kWidth);
        for (; i < count; ++i) sums[0] += load(block + i * kWidth);
        const Vec block_sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
        const Vec block_mean = block_sum * (1.0f / count);
        total += block_sum;
        for (i = 0; i + 4 <= count; i += 4)
            for (int j = 0; j < 4; ++j) {
                const Vec d = load(block + (i + j) * kWidth) - block_mean;
                deviations[j] += d * d;
            }
        for (; i < count; ++i) {
            const Vec d = load(block + i * kWidth) - block_mean;
            deviations[0] += d * d;
        }
        const Vec delta = block_mean - mean;
        const float share = float(count) / float(done + count);
        mean += delta * share;
        squares += (deviations[0] + deviations[1]) + (deviations[2] + deviations[3]) +
                   delta * delta * (done * share);
        done += count;
    }
    const int whole = vectors * kWidth;
    float all = sum(total);
    for (int i = whole; i < n; ++i) all += to_float(x[i]);
    all /= n;
    // Around the mean of each lane so far; now around that of the row.
    float deviations = sum(squares) + vectors * sum((mean - all) * (mean - all));
    for (int i = whole; i < n; ++i) deviations += (to_float(x[i]) - all) * (to_float(x[i]) - all);
    return {all, deviations / n};
}

template <class T>
float mean_square_of(const T* x, int n) {
    Vec total{};
    int i = 0;
    for (; i + kBlock <= n; i += kBlock) {
        Vec sums[4] = {};
        for (int v = 0; v < 16; ++v) {
            const Vec z = load(x + i + v * kWidth);
            sums[v % 4] += z * z;
        }
        total += (sums[0] + sums[1]) + (sums[2] + sums[3]);
    }
    for_each_vector(i, n, [&](int64_t j, int count) VLMKERNELS_INLINED {
        const Vec z = load_first(x + j, count);
        total += z * z;
    });
    return sum(total) / n;
}

// Writes h = x + residual where there is a residual. Returns h of a row.
template <class T>
const T* row_of(const NormParams& p, int64_t row) {
    const int n = p.hidden_dim;
    const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
    if (!p.residual) return x;
    const T* residual = static_cast<const T*>(p.residual) + row * p.residual_stride;
    T* h = static_cast<T*>(p.h) + row * n;
    for_each_vector(0, n, [&](int64_t i, int count) VLMKERNELS_INLINED {
        store_first(h + i, load_first(x + i, count) + load_first(residual + i, count), count);
    });
    return h;
}

template <class T, class W, bool kCentered>
void forward_rows(const NormParams& p, int64_t begin, int64_t end) {
    const int n = p.hidden_dim;
    const W *weight = static_cast<const W*>(p.weight), *bias = static_cast<const W*>(p.bias);
    for (int64_t row = begin; row < end; ++row) {
        const T* x = row_of<T>(p, row);
        const T* ahead = x + p.x_stride;  // asked for meanwhile
        float mean = 0, variance;
        if constexpr (kCentered) {
            const Moments moments = moments_of(x, n);
            mean = moments.mean;
            variance = moments.variance;
        } else {
            variance = mean_square_of(x, n);
        }
        const float rstd = 1.0f / std::sqrt(variance + p.eps);
        if (p.rstd) {
            p.rstd[row] = rstd;
            if (kCentered) p.mean[row] = mean;
        }
        T* y = static_cast<T*>(p.y) + row * n;
        for_each_vector(0, n, [&](int64_t i, int count) VLMKERNELS_INLINED {
            __builtin_prefetch(ahead + i);
            Vec z = (load_first(x + i, count) - mean) * rstd * load_first(weight + i, count);
            if (bias) z += load_first(bias + i, count);
            store_first(y + i, z, count);
        });
    }
}

// kRows rows at once: what they add to the weight gradients is loaded and stored once.
template <int kRows, class T, class W>
void backward_some(const NormBackwardParams& p, int64_t row, float* dweight, float* dbias) {
    const int n = p.hidden_dim;
    const T *h[kRows], *dy[kRows], *dh = static_cast<const T*>(p.dh);
    const W* w = static_cast<const W*>(p.weight);
    float mean[kRows], rstd[kRows];
    for (int r = 0; r < kRows; ++r) {
        h[r] = static_cast<const T*>(p.h) + (row + r) * p.h_stride;
        dy[r] = static_cast<const T*>(p.dy) + (row + r) * n;
        mean[r] = p.mean ? p.mean[row + r] : 0;
        rstd[r] = p.rstd[row + r];
    }
    Vec along[kRows] = {}, common[kRows] = {};  // sums of g xhat and g
    for_each_vector(0, n, [&](int64_t i, int count) VLMKERNELS_INLINED {
        const Vec weight = load_first(w + i, count);
        Vec dw{}, db{};
        for (int r = 0; r < kRows; ++r) {
            const Vec xhat = (load_first(h[r] + i, count) - mean[r]) * rstd[r];
            const Vec d = load_first(dy[r] + i, count);
            dw += d * xhat;
            db += d;
            along[r] += d * weight * xhat;
            common[r] += d * weight;
        }
        if (dweight) store_first(dweight + i, load_first(dweight + i, count) + dw, count);
        if (dbias) store_first(dbias + i, load_first(dbias + i, count) + db, count);
    });
    for (int r = 0; r < kRows; ++r) {
        const float a = sum(along[r]) / n, c = p.mean ? sum(common[r]) / n : 0;
        const int64_t offset = (row + r) * n;
        T* dx = static_cast<T*>(p.dx) + offset;
        for_each_vector(0, n, [&](int64_t i, int count) VLMKERNELS_INLINED {
            __builtin_prefetch(h[r] + kRows * p.h_stride + i);
            __builtin_prefetch(dy[r] + kRows * n + i);
            const Vec xhat = (load_first(h[r] + i, count) - mean[r]) * rstd[r];
            const Vec g = load_first(dy[r] + i, count) * load_first(w + i, count);
            Vec z = rstd[r] * (g - c - xhat * a);
            if (dh) z += load_first(dh + offset + i, count);
            store_first(dx + i, z, count);
        });
    }
}

// Rows begin..end, and their share of the weight gradients into one partial.
template <class T, class W>
void backward_rows(const NormBackwardParams& p, int64_t begin, int64_t end, int64_t partial) {
    auto zeros = [&](float* partials) {
        float* mine = partials + partial * p.hidden_dim;
        std::memset(mine, 0, p.hidden_dim * sizeof(float));
        return mine;
    };
    float* dweight = p.dweight ? zeros(p.dweight_partials) : nullptr;
    float* dbias = p.dbias ? zeros(p.dbias_partials) : nullptr;
    int64_t row = begin;
    for (; row + 4 <= end; row += 4) backward_some<4, T, W>(p, row, dweight, dbias);
    for (; row < end; ++row) backward_some<1, T, W>(p, row, dweight, dbias);
}

// Calls f.template operator()<T, W>() with the types of x and of the weight: T or float.
template <class F>
void dispatch(DType dtype, DType weight_dtype, F&& f) {
    dispatch_float(dtype, [&]<class T>() {
        if (weight_dtype == dtype)
            f.template operator()<T, T>();
        else
            f.template operator()<T, float>();
    });
}

}  // namespace

template <class Isa>
void norm_cpu(const NormParams& p) {
    parallel_for(p.num_rows, 1 + (1 << 15) / p.hidden_dim, [&](int64_t begin, int64_t end) {
        dispatch(p.dtype, p.weight_dtype, [&]<class T, class W>() {
            p.centered ? forward_rows<T, W, true>(p, begin, end)
                       : forward_rows<T, W, false>(p, begin, end);
        });
    });
}

template <class Isa>
void norm_backward_cpu(const NormBackwardParams& p) {
    const int64_t rows_per_partial = (p.num_rows + p.num_partials - 1) / p.num_partials;
    const int64_t grain = 1 + (1 << 15) / (p.hidden_dim * (rows_per_partial + 1));
    parallel_for(p.num_partials, grain, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i)
            dispatch(p.dtype, p.weight_dtype, [&]<class T, class W>() {
                backward_rows<T, W>(p, p.num_rows * i / p.num_partials,
                                    p.num_rows * (i + 1) / p.num_partials, i);
            });
    });
    column_sums(column_sums_of(p));
}

template void norm_cpu<VLMKERNELS_ISA>(const NormParams& p);
template void norm_backward_cpu<VLMKERNELS_ISA>(const NormBackwardParams& p);

}  // namespace vlmkernels
