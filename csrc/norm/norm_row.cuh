// A row lies in the registers of kWidth threads: vector v of a thread holds V columns from
// (v * kWidth + lane) * V on, so that neighbouring threads read neighbouring memory.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "common/reduce.cuh"
#include "common/vector.cuh"
#include "norm/norm.h"

namespace vlmkernels {

template <int V_, int kWidth_, int kItems_>
struct RowSpread {
    static constexpr int V = V_;            // elements per load
    static constexpr int kWidth = kWidth_;  // threads per row
    static constexpr int kItems = kItems_;  // elements per thread
    static constexpr int kVectors = kItems / V;
    static constexpr int kCapacity = kWidth * kItems;
    static constexpr int kThreads = kWidth < 256 ? 256 : kWidth;  // of a CTA
    static constexpr int kRows = kThreads / kWidth;               // rows that a CTA holds at once

    __device__ static int lane() { return threadIdx.x % kWidth; }
    __device__ static int group() { return threadIdx.x / kWidth; }

    // f(column, v): vector v of this thread holds V columns from `column` on.
    template <class F>
    __device__ static void for_each_vector(int hidden_dim, F&& f) {
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
            const int column = (v * kWidth + lane()) * V;
            if (column < hidden_dim) f(column, v);
        }
    }
};

// This thread's part of a row as it lies in memory; zeros where there is nothing. All of its loads
// are in flight together: they are issued before the first value is used.
template <class T, class Spread>
struct RowPart {
    static constexpr int V = Spread::V;
    Vector<T, V> vectors[Spread::kVectors];

    __device__ void load(const T* row, int hidden_dim, bool valid) {
#pragma unroll
        for (int v = 0; v < Spread::kVectors; ++v) vectors[v] = {};
        if (valid)
            Spread::for_each_vector(
                hidden_dim, [&](int column, int v) { vectors[v] = load_vector<V>(row + column); });
    }
    __device__ void get(int v, float (&to)[V]) const { unpack(vectors[v], to); }
};

template <int V, class T>
__device__ void load_weight(const void* weight, bool is_float, int column, float (&w)[V]) {
    if (is_float)
        load(static_cast<const float*>(weight) + column, w);
    else
        load(static_cast<const T*>(weight) + column, w);
}

// Calls f with the first of the spreads, in order of their capacity, that holds a row.
template <class Spread, class... Wider, class F>
Error narrowest_spread(int hidden_dim, F&& f) {
    if constexpr (sizeof...(Wider) > 0)
        if (hidden_dim > Spread::kCapacity) return narrowest_spread<Wider...>(hidden_dim, f);
    return f(Spread());
}

inline bool divides(int bytes, const void* pointer) {
    return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

template <class T>
Error launch_norm_typed(const NormParams& p, Stream stream);
template <class T>
Error launch_norm_backward_typed(const NormBackwardParams& p, Stream stream);

}  // namespace vlmkernels
