// Forward: a CTA takes a tile of tokens, computes its angles, and goes over all heads of q, then of
// k: each is read once, normalised and rotated in registers, and written once.
#pragma once

#include "qk_norm_rope/heads.cuh"

namespace vlmkernels {

template <class T, class Spread>
__device__ void norm_and_rotate(const QkNormRopeParams& p, const NormedHeads& h,
                                const Angles& angles, int first, int tokens) {
    constexpr int V = Spread::V, kItems = Spread::kItems;
    const int pairs = p.rotation.num_pairs;
    const bool float_weight = p.weight_dtype == DType::kFloat32;
    float wa[kItems], wb[kItems];
    Spread::for_each_slot(p.head_dim, pairs, [&](int a, int b, int, int i) {
        float w[V];
        load_weight<V, T>(h.weight, float_weight, a, w);
#pragma unroll
        for (int j = 0; j < V; ++j) wa[i + j] = w[j];
        load_weight<V, T>(h.weight, float_weight, b, w);
#pragma unroll
        for (int j = 0; j < V; ++j) wb[i + j] = w[j];
    });
    Spread::for_each_item(tokens * h.num_heads, [&](int item, bool valid) {
        uint32_t head = item;
        const int t = h.by_heads(head);
        const int64_t batch = (first + t) / p.rotation.seqlen;
        const int64_t token = first + t - batch * p.rotation.seqlen;
        const T* x = static_cast<const T*>(h.x) + head_offset(h.x_strides, batch, token, head);
        float xa[kItems], xb[kItems], square[1] = {0.0f};
        if (valid)
            Spread::for_each_slot(p.head_dim, pairs, [&](int a, int b, int, int i) {
                float u[V], v[V];
                const auto x_a = load_vector<V>(x + a), x_b = load_vector<V>(x + b);
                unpack(x_a, u);
                unpack(x_b, v);
#pragma unroll
                for (int j = 0; j < V; ++j) {
                    square[0] += u[j] * u[j] + v[j] * v[j];
                    xa[i + j] = u[j];
                    xb[i + j] = v[j];
                }
            });
        group_sum<Spread::kLanes>(square, nullptr);
        if (!valid) return;
        const float rstd = rsqrtf(square[0] / p.head_dim + p.eps);
        T* y = static_cast<T*>(h.out) + head_offset(h.out_strides, batch, token, head);
        Spread::for_each_slot(p.head_dim, pairs, [&](int a, int b, int pair, int i) {
            float c[V], s[V], ya[V], yb[V];
            angles.get(t, pairs, pair, c, s);
#pragma unroll
            for (int j = 0; j < V; ++j) {
                const float na = xa[i + j] * rstd * wa[i + j], nb = xb[i + j] * rstd * wb[i + j];
                ya[j] = na * c[j] - nb * s[j];
                yb[j] = nb * c[j] + na * s[j];
            }
            store(y + a, ya);
            store(y + b, yb);
        });
    });
}

template <class T, class Spread>
__global__ void __launch_bounds__(kHeadThreads)
    qk_norm_rope_kernel(const __grid_constant__ QkNormRopeParams p, int tokens_per_cta) {
    __shared__ Angles angles;
    const int first = blockIdx.x * tokens_per_cta;
    const int tokens = min(tokens_per_cta, p.num_tokens - first);
    angles.compute(p.rotation, first, tokens);
    __syncthreads();
    norm_and_rotate<T, Spread>(p, p.q, angles, first, tokens);
    norm_and_rotate<T, Spread>(p, p.k, angles, first, tokens);
}

template <class T>
Error launch_qk_norm_rope_typed(const QkNormRopeParams& p, Stream stream) {
    return dispatch_heads<T>(p, [&]<class Spread>(Spread) {
        const int tokens = tile_tokens(p);
        const unsigned grid = (unsigned(p.num_tokens) + tokens - 1) / tokens;
        qk_norm_rope_kernel<T, Spread><<<grid, kHeadThreads, 0, stream>>>(p, tokens);
        return Error(cudaGetLastError());
    });
}

}  // namespace vlmkernels
