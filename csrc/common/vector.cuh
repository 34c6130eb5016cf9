// Vectors of elements: one load or store each, and their conversion to and from float.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace vlmkernels {

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
__device__ inline T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
    return x;
}
template <>
__device__ inline __half from_float<__half>(float x) {
    return __float2half_rn(x);
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
    return __float2bfloat16_rn(x);
}

// N elements, aligned as one access of up to 16 bytes needs.
template <class T, int N>
struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Vector {
    T x[N];
};

// Several loads in flight: first load_vector all, then unpack.
template <int N, class T>
__device__ inline Vector<T, N> load_vector(const T* from) {
    return *reinterpret_cast<const Vector<T, N>*>(from);
}

template <class T, int N>
__device__ inline void unpack(const Vector<T, N>& v, float (&to)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] = to_float(v.x[i]);
}

template <class T, int N>
__device__ inline void load(const T* from, float (&to)[N]) {
    unpack(load_vector<N>(from), to);
}

template <class T, int N>
__device__ inline void store(T* to, const float (&from)[N]) {
    Vector<T, N> v;
#pragma unroll
    for (int i = 0; i < N; ++i) v.x[i] = from_float<T>(from[i]);
    *reinterpret_cast<Vector<T, N>*>(to) = v;
}

}  // namespace vlmkernels
