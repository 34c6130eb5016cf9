// Backward: with dn = R^T dy, xhat = x rstd and g = dn * weight,
//   dx = rstd (g - xhat mean(g xhat)),  dweight = sum of dn xhat over tokens and heads.
// rstd is computed again from x, which is read anyway. A CTA goes over its tiles of tokens twice,
// for q and for k, keeps the sums for dweight in registers, and writes them as its row of partials.
#pragma once

#include "qk_norm_rope/heads.cuh"

namespace vlmkernels {

// Sums over the groups of the CTA, in a fixed order.
template <class Spread>
__device__ void write_partial(float (&da)[Spread::kItems], float (&db)[Spread::kItems],
                              int head_dim, int num_pairs, float* out) {
    constexpr int V = Spread::V, kWarps = kHeadThreads / 32;
    __shared__ float sums[kWarps][kMaxNormedHeadDim];
#pragma unroll
    for (int i = 0; i < Spread::kItems; ++i)
#pragma unroll
        for (int offset = 16; offset >= Spread::kLanes; offset /= 2) {
            da[i] += __shfl_xor_sync(0xffffffffu, da[i], offset);
            db[i] += __shfl_xor_sync(0xffffffffu, db[i], offset);
        }
    __syncthreads();  // what was here before has been read
    if (threadIdx.x % 32 < Spread::kLanes)
        Spread::for_each_slot(head_dim, num_pairs, [&](int a, int b, int, int i) {
#pragma unroll
            for (int j = 0; j < V; ++j) {
                sums[threadIdx.x / 32][a + j] = da[i + j];
                sums[threadIdx.x / 32][b + j] = db[i + j];
            }
        });
    __syncthreads();
    for (int i = threadIdx.x; i < head_dim; i += kHeadThreads) {
        float sum = 0.0f;
#pragma unroll
        for (int warp = 0; warp < kWarps; ++warp) sum += sums[warp][i];
        out[i] = sum;
    }
}

// One head: writes dx, adds to da and db what the head gives to dweight.
template <class T, class Spread>
__device__ void backward_head(const QkNormRopeParams& p, const NormedHeads& h, const Angles& angles,
                              int first, int item, bool valid, float (&da)[Spread::kItems],
                              float (&db)[Spread::kItems]) {
    constexpr int V = Spread::V, kItems = Spread::kItems;
    const int pairs = p.rotation.num_pairs;
    const bool float_weight = p.weight_dtype == DType::kFloat32;
    uint32_t head = item;
    const int t = h.by_heads(head);
    const int64_t batch = (first + t) / p.rotation.seqlen;
    const int64_t token = first + t - batch * p.rotation.seqlen;
    float xa[kItems], xb[kItems], ga[kItems], gb[kItems], sums[2] = {0.0f, 0.0f};
    if (valid) {
        const T* x = static_cast<const T*>(h.x) + head_offset(h.x_strides, batch, token, head);
        const T* dy = static_cast<const T*>(h.dy) + head_offset(h.dy_strides, batch, token, head);
        Spread::for_each_slot(p.head_dim, pairs, [&](int a, int b, int pair, int i) {
            float u[V], v[V], du[V], dv[V], c[V], s[V], wa[V], wb[V];
            const auto x_a = load_vector<V>(x + a), x_b = load_vector<V>(x + b);
            const auto dy_a = load_vector<V>(dy + a), dy_b = load_vector<V>(dy + b);
            unpack(x_a, u);
            unpack(x_b, v);
            unpack(dy_a, du);
            unpack(dy_b, dv);
            load_weight<V, T>(h.weight, float_weight, a, wa);
            load_weight<V, T>(h.weight, float_weight, b, wb);
            angles.get(t, pairs, pair, c, s);
#pragma unroll
            for (int j = 0; j < V; ++j) {
                xa[i + j] = u[j];
                xb[i + j] = v[j];
                ga[i + j] = du[j] * c[j] + dv[j] * s[j];  // dn for now
                gb[i + j] = dv[j] * c[j] - du[j] * s[j];
                sums[0] += u[j] * u[j] + v[j] * v[j];
                sums[1] += ga[i + j] * wa[j] * u[j] + gb[i + j] * wb[j] * v[j];
            }
        });
    }
    group_sum<Spread::kLanes>(sums, nullptr);
    if (!valid) return;
    const float rstd = rsqrtf(sums[0] / p.head_dim + p.eps);
    const float along = sums[1] / p.head_dim * rstd * rstd;
    T* dx = static_cast<T*>(h.out) + head_offset(h.out_strides, batch, token, head);
    Spread::for_each_slot(p.head_dim, pairs, [&](int a, int b, int, int i) {
        float wa[V], wb[V];
        load_weight<V, T>(h.weight, float_weight, a, wa);
        load_weight<V, T>(h.weight, float_weight, b, wb);
#pragma unroll
        for (int j = 0; j < V; ++j) {
            da[i + j] += ga[i + j] * xa[i + j] * rstd;
            db[i + j] += gb[i + j] * xb[i + j] * rstd;
            wa[j] = rstd * (ga[i + j] * wa[j] - xa[i + j] * along);
            wb[j] = rstd * (gb[i + j] * wb[j] - xb[i + j] * along);
        }
        store(dx + a, wa);
        store(dx + b, wb);
    });
}

template <class T, class Spread>
__global__ void __launch_bounds__(kHeadThreads)
    qk_norm_rope_backward_kernel(const __grid_constant__ QkNormRopeParams p, int tokens_per_tile) {
    __shared__ Angles angles;
    const int stride = gridDim.x * tokens_per_tile;
#pragma unroll 1
    for (int which = 0; which < 2; ++which) {
        const NormedHeads& h = which ? p.k : p.q;
        float da[Spread::kItems] = {}, db[Spread::kItems] = {};
        for (int64_t first = blockIdx.x * tokens_per_tile; first < p.num_tokens; first += stride) {
            const int tokens = min(int64_t(tokens_per_tile), p.num_tokens - first);
            __syncthreads();  // the angles of the last tile have been read
            angles.compute(p.rotation, int(first), tokens);
            __syncthreads();
            Spread::for_each_item(tokens * h.num_heads, [&](int item, bool valid) {
                backward_head<T, Spread>(p, h, angles, int(first), item, valid, da, db);
            });
        }
        if (float* partials = p.partials[which])
            write_partial<Spread>(da, db, p.head_dim, p.rotation.num_pairs,
                                  partials + int64_t(blockIdx.x) * p.head_dim);
    }
}

template <class T>
Error launch_qk_norm_rope_backward_typed(const QkNormRopeParams& p, Stream stream) {
    return dispatch_heads<T>(p, [&]<class Spread>(Spread) {
        qk_norm_rope_backward_kernel<T, Spread>
            <<<p.num_partials, kHeadThreads, 0, stream>>>(p, tile_tokens(p));
        return Error(cudaGetLastError());
    });
}

}  // namespace vlmkernels
