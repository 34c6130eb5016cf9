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

    // f(column, i): V columns from `column` on are elements i, i + 1, ... of this thread.
    template <class F>
    __device__ static void for_each_vector(int hidden_dim, F&& f) {
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
            const int column = (v * kWidth + lane()) * V;
            if (column < hidden_dim) f(column, v * V);
        }
    }
};

template <int V, class T>
__device__ void load_weight(const void* weight, bool is_float, int column, float (&w)[V]) {
    if (is_float)
        load(static_cast<const float*>(weight) + column, w);
    else
        load(static_cast<const T*>(weight) + column, w);
}

// Calls f(RowSpread()) with the narrowest spread that holds a row; V = 1 serves every alignment.
template <int V, int kItems, class F>
Error dispatch_spread(int hidden_dim, F&& f) {
    constexpr int kWarpWidth = 32, kFewItems = 8;
    if constexpr (V > 1) {
        if (hidden_dim <= 16 * kFewItems) return f(RowSpread<V, 16, kFewItems>());
        if (hidden_dim <= kWarpWidth * kFewItems) return f(RowSpread<V, kWarpWidth, kFewItems>());
        constexpr int kWidth = 1024 / kItems;
        if (hidden_dim <= 1024) return f(RowSpread<V, kWidth, kItems>());
        if (hidden_dim <= 2048) return f(RowSpread<V, 2 * kWidth, kItems>());
        if (hidden_dim <= 4096) return f(RowSpread<V, 4 * kWidth, kItems>());
    }
    return f(RowSpread<V, kMaxHiddenDimCuda / kItems, kItems>());
}

inline bool divides(int bytes, const void* pointer) {
    return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

template <class T>
Error launch_norm_typed(const NormParams& p, Stream stream);
template <class T>
Error launch_norm_backward_typed(const NormBackwardParams& p, Stream stream);

}  // namespace vlmkernels
