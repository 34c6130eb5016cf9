// A head lies in the registers of kLanes threads, in slots of two vectors of V elements that are
// rotated with each other: those of pairs first ... first + V - 1, or two neighbours from beyond
// rotary_dim, which are not rotated.
#pragma once

#include <cuda_runtime.h>

#include "common/reduce.cuh"
#include "common/rotation.cuh"
#include "common/vector.cuh"
#include "qk_norm_rope/qk_norm_rope.h"

namespace vlmkernels {

inline constexpr int kHeadThreads = 256;
inline constexpr int kTileAngles = 512;  // tokens of a tile * num_pairs

template <int V_, int kLanes_, int kSlots_>
struct HeadSpread {
    static constexpr int V = V_, kLanes = kLanes_, kSlots = kSlots_;
    static constexpr int kGroups = kHeadThreads / kLanes;  // heads that a CTA holds at once
    static constexpr int kItems = V * kSlots;              // pairs of elements per thread

    // f(a, b, pair, i): elements a ... and b ... of the head are elements i ... of the two halves
    // that this thread holds; pair is the first of their angles, or negative: not rotated.
    template <class F>
    __device__ static void for_each_slot(int head_dim, int num_pairs, F&& f) {
#pragma unroll
        for (int slot = 0; slot < kSlots; ++slot) {
            const int first = (slot * kLanes + int(threadIdx.x) % kLanes) * V;
            if (2 * first >= head_dim) continue;
            if (first < num_pairs)
                f(first, first + num_pairs, first, slot * V);
            else
                f(2 * first, 2 * first + V, -1, slot * V);
        }
    }

    // f(item, valid) for this group's share of `items`; all threads of a warp make the same turns.
    template <class F>
    __device__ static void for_each_item(int items, F&& f) {
        const int group = threadIdx.x / kLanes;
        for (int first = 0; first < items; first += kGroups)
            f(first + group, first + group < items);
    }
};

template <int V, class T>
__device__ inline void load_weight(const void* weight, bool is_float, int i, float (&w)[V]) {
    if (is_float)
        load(static_cast<const float*>(weight) + i, w);
    else
        load(static_cast<const T*>(weight) + i, w);
}

// The angles of a tile of tokens, in shared memory.
struct Angles {
    __align__(16) float cosines[kTileAngles], sines[kTileAngles];

    __device__ void compute(const Rotation& r, int first, int tokens) {
        load_rotations(r, first, tokens, threadIdx.x, kHeadThreads, cosines, sines);
    }
    template <int V>
    __device__ void get(int token, int num_pairs, int pair, float (&c)[V], float (&s)[V]) const {
#pragma unroll
        for (int i = 0; i < V; ++i) c[i] = 1.0f, s[i] = 0.0f;
        if (pair < 0) return;
        load(cosines + token * num_pairs + pair, c);
        load(sines + token * num_pairs + pair, s);
    }
};

__device__ inline int64_t head_offset(const HeadStrides& s, int64_t batch, int64_t token,
                                      int head) {
    return batch * s.batch + token * s.token + head * s.head;
}

inline int tile_tokens(const QkNormRopeParams& p) {
    int tokens = kTileAngles / p.rotation.num_pairs;
    tokens = tokens < 16 ? tokens : 16;
    while (tokens > 1 && p.num_tokens / tokens < 264) tokens /= 2;  // 2 CTAs for each of 132 SMs
    return tokens;
}

// True when every vector of V elements is aligned to its size, here and in the weights.
inline bool heads_fit(const QkNormRopeParams& p, int V) {
    auto divides = [](int bytes, const void* pointer) {
        return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
    };
    const int bytes = V * size_of(p.dtype);
    const int weight_bytes = V * size_of(p.weight_dtype) < 16 ? V * size_of(p.weight_dtype) : 16;
    bool fits = p.rotation.num_pairs % V == 0 && p.head_dim % (2 * V) == 0;
    for (const NormedHeads& h : {p.q, p.k}) {
        fits = fits && divides(bytes, h.x) && divides(bytes, h.dy) && divides(bytes, h.out) &&
               divides(weight_bytes, h.weight);
        for (const HeadStrides& s : {h.x_strides, h.dy_strides, h.out_strides})
            fits = fits && s.batch % V == 0 && s.token % V == 0 && s.head % V == 0;
    }
    return fits;
}

// Calls f(HeadSpread()) with the widest vectors that fit and the fewest lanes that hold a head.
template <class T, class F>
Error dispatch_heads(const QkNormRopeParams& p, F&& f) {
    auto lanes = [&]<int V>() -> Error {
        if (p.head_dim <= 16 * V) return f(HeadSpread<V, 8, 1>());
        if (p.head_dim <= 32 * V) return f(HeadSpread<V, 16, 1>());
        return f(HeadSpread<V, 32, 1>());
    };
    if (sizeof(T) == 2 && heads_fit(p, 8)) return lanes.template operator()<8>();
    if (heads_fit(p, 4)) return lanes.template operator()<4>();
    return f(HeadSpread<1, 32, kMaxNormedHeadDim / 64>());
}

template <class T>
Error launch_qk_norm_rope_typed(const QkNormRopeParams& p, Stream stream);
template <class T>
Error launch_qk_norm_rope_backward_typed(const QkNormRopeParams& p, Stream stream);

}  // namespace vlmkernels
