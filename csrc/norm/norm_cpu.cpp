// A row at a time, in fp32 buffers that stay in the first-level cache.
#include <cmath>
#include <cstdlib>
#include <type_traits>

#include "common/cpu.h"
#include "norm/norm.h"

namespace vlmkernels {
namespace {

// Not std::vector: its code would be shared between instruction sets.
struct Buffer {
    explicit Buffer(int64_t n) : x(static_cast<float*>(std::malloc(n * sizeof(float)))) {
        if (!x) std::abort();
    }
    ~Buffer() { std::free(x); }
    Buffer(const Buffer&) = delete;
    float* const x;
};

template <class T>
void to_floats(const void* from, int n, float* to) {
    for (int i = 0; i < n; ++i) to[i] = to_float(static_cast<const T*>(from)[i]);
}

void to_floats(DType dtype, const void* from, int n, float* to) {
    dispatch_float(dtype, [&]<class T>() { to_floats<T>(from, n, to); });
}

struct Moments {
    float sum, squares;
};

// Sums of x - shift and of its square, with enough accumulators to hide the latency of an add.
Moments moments(const float* x, int n, float shift) {
    constexpr int kWays = 64;
    float sums[kWays] = {}, squares[kWays] = {}, sum = 0, square = 0;
    int i = 0;
    for (; i + kWays <= n; i += kWays)
        for (int j = 0; j < kWays; ++j) {
            const float d = x[i + j] - shift;
            sums[j] += d;
            squares[j] += d * d;
        }
    for (; i < n; ++i) {
        sum += x[i] - shift;
        square += (x[i] - shift) * (x[i] - shift);
    }
#pragma omp simd reduction(+ : sum, square)
    for (int j = 0; j < kWays; ++j) {
        sum += sums[j];
        square += squares[j];
    }
    return {sum, square};
}

// Mean and mean square deviation in one pass, about the mean of the first 64 elements: at most
// sqrt(n) / 8 standard deviations off, whatever the row holds, so that the difference keeps its
// digits.
void mean_and_variance(const float* x, int n, float& mean, float& variance) {
    const int first = n < 64 ? n : 64;
    const float shift = moments(x, first, 0).sum / first;
    const Moments m = moments(x, n, shift);
    const float offset = m.sum / n;
    mean = shift + offset;
    variance = std::fmax(m.squares / n - offset * offset, 0.0f);
}

// Writes h = x + residual where there is a residual. Returns h of a row in fp32: in `buffer` unless
// it is in memory.
template <class T>
const float* load_row(const NormParams& p, int64_t row, float* buffer) {
    const int n = p.hidden_dim;
    const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
    if (p.residual) {
        const T* residual = static_cast<const T*>(p.residual) + row * p.residual_stride;
        T* h = static_cast<T*>(p.h) + row * n;
#pragma omp simd
        for (int i = 0; i < n; ++i) h[i] = from_float<T>(to_float(x[i]) + to_float(residual[i]));
        x = h;
    }
    if constexpr (std::is_same_v<T, float>) return x;
    to_floats<T>(x, n, buffer);
    return buffer;
}

template <class T>
void normalize(T* y, const float* z, const float* w, const float* b, float mean, float rstd,
               int n) {
    if (b) {
#pragma omp simd
        for (int i = 0; i < n; ++i) y[i] = from_float<T>((z[i] - mean) * rstd * w[i] + b[i]);
    } else {
#pragma omp simd
        for (int i = 0; i < n; ++i) y[i] = from_float<T>((z[i] - mean) * rstd * w[i]);
    }
}

template <class T, bool kCentered>
void forward_rows(const NormParams& p, int64_t begin, int64_t end) {
    const int n = p.hidden_dim;
    Buffer z(n), weight(n), bias(n);
    to_floats(p.weight_dtype, p.weight, n, weight.x);
    if (p.bias) to_floats(p.weight_dtype, p.bias, n, bias.x);
    for (int64_t row = begin; row < end; ++row) {
        const float* x = load_row<T>(p, row, z.x);
        float mean = 0, variance;
        if (kCentered)
            mean_and_variance(x, n, mean, variance);
        else
            variance = moments(x, n, 0).squares / n;
        const float rstd = 1.0f / std::sqrt(variance + p.eps);
        if (kCentered) p.mean[row] = mean;
        p.rstd[row] = rstd;
        normalize(static_cast<T*>(p.y) + row * n, x, weight.x, p.bias ? bias.x : nullptr, mean,
                  rstd, n);
    }
}

template <class T>
void backward_row(const NormBackwardParams& p, int64_t row, const float* w, float* xhat, float* g,
                  float* dweight, float* dbias) {
    const int n = p.hidden_dim;
    const T* h = static_cast<const T*>(p.h) + row * p.h_stride;
    const T* dy = static_cast<const T*>(p.dy) + row * n;
    const float mean = p.mean ? p.mean[row] : 0, rstd = p.rstd[row];
    float along = 0, common = 0;
#pragma omp simd reduction(+ : along, common)
    for (int i = 0; i < n; ++i) {
        const float d = to_float(dy[i]);
        xhat[i] = (to_float(h[i]) - mean) * rstd;
        g[i] = d * w[i];
        along += g[i] * xhat[i];
        common += g[i];
        dweight[i] += d * xhat[i];
        dbias[i] += d;
    }
    along /= n;
    common = p.mean ? common / n : 0;
    T* dx = static_cast<T*>(p.dx) + row * n;
    if (p.dh) {
        const T* dh = static_cast<const T*>(p.dh) + row * n;
#pragma omp simd
        for (int i = 0; i < n; ++i)
            dx[i] = from_float<T>(to_float(dh[i]) + rstd * (g[i] - common - xhat[i] * along));
    } else {
#pragma omp simd
        for (int i = 0; i < n; ++i) dx[i] = from_float<T>(rstd * (g[i] - common - xhat[i] * along));
    }
}

// Rows begin..end, and their share of the weight gradients into one partial.
template <class T>
void backward_rows(const NormBackwardParams& p, int64_t begin, int64_t end, int64_t partial) {
    const int n = p.hidden_dim;
    Buffer weight(n), xhat(n), g(n), unwanted(2 * int64_t(n));
    to_floats(p.weight_dtype, p.weight, n, weight.x);
    float* dweight = p.dweight ? p.dweight_partials + partial * n : unwanted.x;
    float* dbias = p.dbias ? p.dbias_partials + partial * n : unwanted.x + n;
    std::memset(dweight, 0, n * sizeof(float));
    std::memset(dbias, 0, n * sizeof(float));
    for (int64_t row = begin; row < end; ++row)
        backward_row<T>(p, row, weight.x, xhat.x, g.x, dweight, dbias);
}

void sum_partials(const NormBackwardParams& p, const float* partials, void* out) {
    if (!out) return;
    parallel_for(p.hidden_dim, 1024, [&](int64_t begin, int64_t end) {
        const int64_t n = end - begin;
        Buffer sum(n);
        std::memset(sum.x, 0, n * sizeof(float));
        for (int partial = 0; partial < p.num_partials; ++partial) {
            const float* x = partials + int64_t(partial) * p.hidden_dim + begin;
            for (int64_t i = 0; i < n; ++i) sum.x[i] += x[i];
        }
        dispatch_float(p.weight_dtype, [&]<class T>() {
            for (int64_t i = 0; i < n; ++i)
                static_cast<T*>(out)[begin + i] = from_float<T>(sum.x[i]);
        });
    });
}

}  // namespace

template <class Isa>
void norm_cpu(const NormParams& p) {
    parallel_for(p.num_rows, 1 + (1 << 15) / p.hidden_dim, [&](int64_t begin, int64_t end) {
        dispatch_float(p.dtype, [&]<class T>() {
            if (p.mean)
                forward_rows<T, true>(p, begin, end);
            else
                forward_rows<T, false>(p, begin, end);
        });
    });
}

template <class Isa>
void norm_backward_cpu(const NormBackwardParams& p) {
    const int64_t rows_per_partial = (p.num_rows + p.num_partials - 1) / p.num_partials;
    const int64_t grain = 1 + (1 << 15) / (p.hidden_dim * (rows_per_partial + 1));
    parallel_for(p.num_partials, grain, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i)
            dispatch_float(p.dtype, [&]<class T>() {
                backward_rows<T>(p, p.num_rows * i / p.num_partials,
                                 p.num_rows * (i + 1) / p.num_partials, i);
            });
    });
    sum_partials(p, p.dweight_partials, p.dweight);
    sum_partials(p, p.dbias_partials, p.dbias);
}

template void norm_cpu<VLMKERNELS_ISA>(const NormParams& p);
template void norm_backward_cpu<VLMKERNELS_ISA>(const NormBackwardParams& p);

}  // namespace vlmkernels
