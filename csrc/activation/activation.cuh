// A thread takes V columns of one row, in every gridDim.y-th row. Rows that lie one behind the
// other are one long row.
#pragma once

#include <initializer_list>

#include "common/ptx.cuh"
#include "common/vector.cuh"

namespace vlmkernels {
namespace {

// e^x for x <= 0, to about 2 ulp: what x log2(e) loses when it is rounded is made up for.
__device__ __forceinline__ float exp(float x) {
    constexpr float kLog2e = 1.44269504f, kLog2eRest = 1.92596299e-8f, kLn2 = 0.693147181f;
    x = fmaxf(x, -104.0f);  // e^-104 is 0, and below there is no infinity
    const float t = x * kLog2e, lost = fmaf(x, kLog2e, -t) + x * kLog2eRest, e = exp2_approx(t);
    return fmaf(e * kLn2, lost, e);
}
__device__ __forceinline__ float exp2(float x) { return exp2_approx(x); }
__device__ __forceinline__ float reciprocal(float x) { return __fdividef(1.0f, x); }
__device__ __forceinline__ float magnitude(float x) { return fabsf(x); }
__device__ __forceinline__ float at_most(float x, float limit) { return fminf(x, limit); }
__device__ __forceinline__ float positive_part(float x) { return x < 0.0f ? 0.0f : x; }
__device__ __forceinline__ float if_negative(float x, float a, float b) { return x < 0.0f ? a : b; }

}  // namespace
}  // namespace vlmkernels

#include "activation/gate.h"  // needs those above

namespace vlmkernels {

inline constexpr int kActivationThreads = 256;

template <class T, int V, Activation kind, bool kGated>
__global__ void __launch_bounds__(kActivationThreads)
    activation_kernel(const __grid_constant__ ActivationParams p) {
    const int64_t column = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * V;
    if (column >= p.dim) return;
    for (int64_t row = blockIdx.y; row < p.num_rows; row += gridDim.y) {
        float x[V], up[V];
        const T* from = static_cast<const T*>(p.x) + row * p.x_stride + column;
        const auto x_vector = load_vector<V>(from);
        if constexpr (kGated) load(static_cast<const T*>(p.up) + row * p.up_stride + column, up);
        unpack(x_vector, x);
#pragma unroll
        for (int i = 0; i < V; ++i) {
            x[i] = activate<kind>(x[i]);
            if constexpr (kGated) x[i] *= up[i];
        }
        store(static_cast<T*>(p.y) + row * p.dim + column, x);
    }
}

template <class T, int V, Activation kind, bool kGated>
__global__ void __launch_bounds__(kActivationThreads)
    activation_backward_kernel(const __grid_constant__ ActivationBackwardParams p) {
    const int64_t column = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * V;
    if (column >= p.dim) return;
    for (int64_t row = blockIdx.y; row < p.num_rows; row += gridDim.y) {
        float dy[V], x[V], up[V];
        const auto dy_vector = load_vector<V>(static_cast<const T*>(p.dy) + row * p.dim + column);
        const auto x_vector =
            load_vector<V>(static_cast<const T*>(p.x) + row * p.x_stride + column);
        if constexpr (kGated) load(static_cast<const T*>(p.up) + row * p.up_stride + column, up);
        unpack(dy_vector, dy);
        unpack(x_vector, x);
#pragma unroll
        for (int i = 0; i < V; ++i) {
            float s, slope;
            gate<kind>(x[i], s, slope);
            const float value = x[i] * s;
            x[i] = dy[i] * (s + x[i] * slope);
            if constexpr (kGated) {
                x[i] *= up[i];
                up[i] = dy[i] * value;
            }
        }
        store(static_cast<T*>(p.dx) + row * p.dx_stride + column, x);
        if constexpr (kGated) store(static_cast<T*>(p.dup) + row * p.dup_stride + column, up);
    }
}

// Calls f(grid, threads): CTAs of even width over the columns, and enough rows of them to fill the
// GPU.
template <int V, class F>
Error over_rows(int64_t num_rows, int64_t dim, F&& f) {
    constexpr int64_t kCtas = 132 * 16;
    if (num_rows == 0 || dim == 0) return cudaSuccess;
    const int64_t vectors = (dim + V - 1) / V;
    const int64_t wide = (vectors + kActivationThreads - 1) / kActivationThreads;
    const int64_t threads = ((vectors + wide - 1) / wide + 31) / 32 * 32;
    const int64_t x = (vectors + threads - 1) / threads, y = kCtas / x < 1 ? 1 : kCtas / x;
    if (x > INT32_MAX) return cudaErrorInvalidConfiguration;
    f(dim3(unsigned(x), unsigned(y < num_rows ? y : num_rows)), unsigned(threads));
    return cudaGetLastError();
}

// True when every vector of V elements is aligned to its size.
template <int V>
bool vectors_fit(int64_t num_rows, int64_t dim, DType dtype,
                 std::initializer_list<const void*> pointers,
                 std::initializer_list<int64_t> strides) {
    bool fit = dim % V == 0;
    for (const void* pointer : pointers)
        fit = fit && reinterpret_cast<uintptr_t>(pointer) % (V * size_of(dtype)) == 0;
    for (int64_t stride : strides) fit = fit && (num_rows == 1 || stride % V == 0);
    return fit;
}

// Calls f.template operator()<V>() with the widest vectors that fit: 16 bytes, 8, one element.
template <class T, class Fits, class F>
Error widest_vectors(Fits&& fits, F&& f) {
    constexpr int V = 16 / sizeof(T);
    if (fits.template operator()<V>()) return f.template operator()<V>();
    if (fits.template operator()<V / 2>()) return f.template operator()<V / 2>();
    return f.template operator()<1>();
}

template <class T, int V>
Error launch_activation_vectors(const ActivationParams& p, Stream stream) {
    return over_rows<V>(p.num_rows, p.dim, [&](dim3 grid, unsigned threads) {
        dispatch_activation(p.kind, [&]<Activation kind>() {
            if (p.up)
                activation_kernel<T, V, kind, true><<<grid, threads, 0, stream>>>(p);
            else
                activation_kernel<T, V, kind, false><<<grid, threads, 0, stream>>>(p);
        });
    });
}

template <class T, int V>
Error launch_activation_backward_vectors(const ActivationBackwardParams& p, Stream stream) {
    return over_rows<V>(p.num_rows, p.dim, [&](dim3 grid, unsigned threads) {
        dispatch_activation(p.kind, [&]<Activation kind>() {
            if (p.up)
                activation_backward_kernel<T, V, kind, true><<<grid, threads, 0, stream>>>(p);
            else
                activation_backward_kernel<T, V, kind, false><<<grid, threads, 0, stream>>>(p);
        });
    });
}

template <class T>
Error launch_activation_typed(const ActivationParams& p, Stream stream) {
    auto fits = [&]<int V>() {
        return vectors_fit<V>(p.num_rows, p.dim, p.dtype, {p.x, p.up, p.y},
                              {p.x_stride, p.up_stride});
    };
    return widest_vectors<T>(fits,
                             [&]<int V>() { return launch_activation_vectors<T, V>(p, stream); });
}

template <class T>
Error launch_activation_backward_typed(const ActivationBackwardParams& p, Stream stream) {
    auto fits = [&]<int V>() {
        return vectors_fit<V>(p.num_rows, p.dim, p.dtype, {p.dy, p.x, p.up, p.dx, p.dup},
                              {p.x_stride, p.up_stride, p.dx_stride, p.dup_stride});
    };
    return widest_vectors<T>(
        fits, [&]<int V>() { return launch_activation_backward_vectors<T, V>(p, stream); });
}

}  // namespace vlmkernels
