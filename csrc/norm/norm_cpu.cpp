// A row at a time, in fp32 buffers that stay in the first-level cache.
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <new>
#include <type_traits>

#include "common/column_sums_cpu.h"
#include "norm/norm.h"

namespace vlmkernels {
namespace {

// Floats for each thread, allocated before the threads start: nothing may throw inside of them.
// Not std::vector: its code would be shared between instruction sets.
class Scratch {
  public:
    explicit Scratch(int64_t per_thread)
        : per_thread_(per_thread),
          x_(static_cast<float*>(std::malloc(max_threads() * per_thread * sizeof(float)))) {
        if (!x_) throw std::bad_alloc();
    }
    ~Scratch() { std::free(x_); }
    Scratch(const Scratch&) = delete;
    float* take() { return x_ + taken_.fetch_add(1, std::memory_order_relaxed) * per_thread_; }

  private:
    const int64_t per_thread_;
    float* const x_;
    std::atomic<int64_t> taken_{0};
};

template <class T>
void to_floats(const void* from, int n, float* to) {
    for (int i = 0; i < n; ++i) to[i] = to_float(static_cast<const T*>(from)[i]);
}

void to_floats(DType dtype, const void* from, int n, float* to) {
    dispatch_float(dtype, [&]<class T>() { to_floats<T>(from, n, to); });
}

// f(0) + ... + f(n - 1), with enough accumulators to hide the latency of an add; by blocks, so that
// one large element does not swallow all small ones after it.
template <class F>
float sum_of(int n, F&& f) {
    constexpr int kWays = 64, kBlock = 16 * kWays;
    float sum = 0;
    for (int begin = 0; begin < n; begin += kBlock) {
        const int end = n - begin < kBlock ? n : begin + kBlock;
        float sums[kWays] = {}, block = 0;
        int i = begin;
        for (; i + kWays <= end; i += kWays)
            for (int j = 0; j < kWays; ++j) sums[j] += f(i + j);
        for (; i < end; ++i) block += f(i);
#pragma omp simd reduction(+ : block)
        for (int j = 0; j < kWays; ++j) block += sums[j];
        sum += block;
    }
    return sum;
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

// Asks for the next row while this one is worked on: the passes over a row leave memory idle.
template <class T>
void prefetch_row(const void* x, int64_t row, int64_t stride, int n) {
    const char* next = reinterpret_cast<const char*>(static_cast<const T*>(x) + row * stride);
    for (int64_t i = 0; i < int64_t(n) * int64_t(sizeof(T)); i += 64) __builtin_prefetch(next + i);
}

template <class T, bool kCentered>
void forward_rows(const NormParams& p, int64_t begin, int64_t end, float* scratch) {
    const int n = p.hidden_dim;
    float *z = scratch, *weight = z + n, *bias = p.bias ? weight + n : nullptr;
    to_floats(p.weight_dtype, p.weight, n, weight);
    if (p.bias) to_floats(p.weight_dtype, p.bias, n, bias);
    for (int64_t row = begin; row < end; ++row) {
        const float* x = load_row<T>(p, row, z);
        // Two passes: a mean taken on the way costs digits where the row drifts.
        const float mean = kCentered ? sum_of(n, [=](int i) { return x[i]; }) / n : 0;
        if (row + 1 < end) prefetch_row<T>(p.x, row + 1, p.x_stride, n);
        const float variance = sum_of(n, [=](int i) { return (x[i] - mean) * (x[i] - mean); }) / n;
        const float rstd = 1.0f / std::sqrt(variance + p.eps);
        if (kCentered) p.mean[row] = mean;
        p.rstd[row] = rstd;
        normalize(static_cast<T*>(p.y) + row * n, x, weight, bias, mean, rstd, n);
    }
}

template <class T>
void backward_row(const NormBackwardParams& p, int64_t row, const float* w, float* dweight,
                  float* dbias) {
    const int n = p.hidden_dim;
    const T* h = static_cast<const T*>(p.h) + row * p.h_stride;
    const T* dy = static_cast<const T*>(p.dy) + row * n;
    const float mean = p.mean ? p.mean[row] : 0, rstd = p.rstd[row];
    // Computed in both passes: cheaper than to store and load them.
    auto xhat = [=](int i) { return (to_float(h[i]) - mean) * rstd; };
    auto g = [=](int i) { return to_float(dy[i]) * w[i]; };
    float along = 0, common = 0;
#pragma omp simd reduction(+ : along, common)
    for (int i = 0; i < n; ++i) {
        along += g(i) * xhat(i);
        common += g(i);
        dweight[i] += to_float(dy[i]) * xhat(i);
        dbias[i] += to_float(dy[i]);
    }
    along /= n;
    common = p.mean ? common / n : 0;
    T* dx = static_cast<T*>(p.dx) + row * n;
    if (p.dh) {
        const T* dh = static_cast<const T*>(p.dh) + row * n;
#pragma omp simd
        for (int i = 0; i < n; ++i)
            dx[i] = from_float<T>(to_float(dh[i]) + rstd * (g(i) - common - xhat(i) * along));
    } else {
#pragma omp simd
        for (int i = 0; i < n; ++i) dx[i] = from_float<T>(rstd * (g(i) - common - xhat(i) * along));
    }
}

// Rows begin..end, and their share of the weight gradients into one partial.
template <class T>
void backward_rows(const NormBackwardParams& p, int64_t begin, int64_t end, int64_t partial,
                   float* scratch) {
    const int n = p.hidden_dim;
    float *weight = scratch, *unwanted = weight + n;
    to_floats(p.weight_dtype, p.weight, n, weight);
    float* dweight = p.dweight ? p.dweight_partials + partial * n : unwanted;
    float* dbias = p.dbias ? p.dbias_partials + partial * n : unwanted + n;
    std::memset(dweight, 0, n * sizeof(float));
    std::memset(dbias, 0, n * sizeof(float));
    for (int64_t row = begin; row < end; ++row) backward_row<T>(p, row, weight, dweight, dbias);
}

}  // namespace

template <class Isa>
void norm_cpu(const NormParams& p) {
    Scratch scratch(3 * int64_t(p.hidden_dim));
    parallel_for(p.num_rows, 1 + (1 << 15) / p.hidden_dim, [&](int64_t begin, int64_t end) {
        float* mine = scratch.take();
        dispatch_float(p.dtype, [&]<class T>() {
            if (p.mean)
                forward_rows<T, true>(p, begin, end, mine);
            else
                forward_rows<T, false>(p, begin, end, mine);
        });
    });
}

template <class Isa>
void norm_backward_cpu(const NormBackwardParams& p) {
    const int64_t rows_per_partial = (p.num_rows + p.num_partials - 1) / p.num_partials;
    const int64_t grain = 1 + (1 << 15) / (p.hidden_dim * (rows_per_partial + 1));
    Scratch scratch(3 * int64_t(p.hidden_dim));
    parallel_for(p.num_partials, grain, [&](int64_t begin, int64_t end) {
        float* mine = scratch.take();
        for (int64_t i = begin; i < end; ++i)
            dispatch_float(p.dtype, [&]<class T>() {
                backward_rows<T>(p, p.num_rows * i / p.num_partials,
                                 p.num_rows * (i + 1) / p.num_partials, i, mine);
            });
    });
    column_sums(column_sums_of(p));
}

template void norm_cpu<VLMKERNELS_ISA>(const NormParams& p);
template void norm_backward_cpu<VLMKERNELS_ISA>(const NormBackwardParams& p);

}  // namespace vlmkernels
