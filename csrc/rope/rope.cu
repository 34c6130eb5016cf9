// A CTA takes a few tokens. Its threads first compute cos and sin of every (token, pair) once, into
// shared memory; then thread (x, y, z) rotates vector x of heads y, y + blockDim.y, ... of tokens
// z, z + blockDim.z, ...: cos and sin stay in registers over the heads.
#include <cuda_runtime.h>

#include "common/rotation.cuh"
#include "rope/rope.h"

namespace vlmkernels {

constexpr int kThreads = 256;
constexpr int kTileAngles = 512;  // tokens of a CTA * num_pairs

template <class T, int V>
__device__ void rotate(const T* x, T* y, int half, const float (&c)[V], const float (&s)[V]) {
    float a[V], b[V], rotated_a[V], rotated_b[V];
    const auto first = load_vector<V>(x), second = load_vector<V>(x + half);
    unpack(first, a);
    unpack(second, b);
#pragma unroll
    for (int i = 0; i < V; ++i) {
        rotated_a[i] = a[i] * c[i] - b[i] * s[i];
        rotated_b[i] = b[i] * c[i] + a[i] * s[i];
    }
    store(y, rotated_a);
    store(y + half, rotated_b);
}

template <class T, int V>
__global__ void __launch_bounds__(kThreads)
    rope_kernel(const __grid_constant__ RopeParams p, int tokens_per_cta) {
    __shared__ __align__(16) float cosines[kTileAngles], sines[kTileAngles];
    const Rotation& r = p.rotation;
    const int first = blockIdx.x * tokens_per_cta;
    const int tokens = min(tokens_per_cta, p.num_tokens - first);
    const int threads = blockDim.x * blockDim.y * blockDim.z;
    const int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
    load_rotations(r, first, tokens, thread, threads, cosines, sines);
    __syncthreads();

    const int rotated = p.q.num_heads + p.k.num_heads;
    for (int t = threadIdx.z; t < tokens; t += blockDim.z) {
        float c[V], s[V];
        load(cosines + t * r.num_pairs + threadIdx.x * V, c);
        load(sines + t * r.num_pairs + threadIdx.x * V, s);
        const int64_t batch = (first + t) / r.seqlen, token = first + t - batch * r.seqlen;
        for (int i = threadIdx.y; i < rotated + p.v.num_heads; i += blockDim.y) {
            const RopeHeads& h = i < p.q.num_heads ? p.q : i < rotated ? p.k : p.v;
            const int head = i < p.q.num_heads ? i : i < rotated ? i - p.q.num_heads : i - rotated;
            const T* x = static_cast<const T*>(h.in) + batch * h.in_strides.batch +
                         token * h.in_strides.token + head * h.in_strides.head;
            T* y = static_cast<T*>(h.out) + batch * h.out_strides.batch +
                   token * h.out_strides.token + head * h.out_strides.head;
            if (i < rotated)
                rotate<T, V>(x + threadIdx.x * V, y + threadIdx.x * V, r.num_pairs, c, s);
            if (x == y) continue;
            const int rest = i < rotated ? 2 * r.num_pairs : 0;
            for (int j = rest + threadIdx.x * V; j < p.head_dim; j += blockDim.x * V)
                *reinterpret_cast<Vector<T, V>*>(y + j) =
                    *reinterpret_cast<const Vector<T, V>*>(x + j);
        }
    }
}

template <class T, int V>
Error launch(const RopeParams& p, Stream stream) {
    const int heads = p.q.num_heads + p.k.num_heads + p.v.num_heads, pairs = p.rotation.num_pairs;
    int tokens = kTileAngles / pairs;
    tokens = tokens < 16 ? tokens : 16;
    while (tokens > 1 && p.num_tokens / tokens < 264) tokens /= 2;  // 2 CTAs for each of 132 SMs
    const int x = pairs / V;
    const int y = heads < kThreads / x ? heads : kThreads / x;
    const int z = tokens < kThreads / (x * y) ? tokens : kThreads / (x * y);
    const unsigned grid = (unsigned(p.num_tokens) + tokens - 1) / tokens;
    rope_kernel<T, V><<<grid, dim3(x, y, z), 0, stream>>>(p, tokens);
    return cudaGetLastError();
}

// True when every vector of V elements of T is aligned to its size.
static bool fits(const RopeParams& p, int V) {
    const int bytes = V * size_of(p.dtype);
    bool fits = p.rotation.num_pairs % V == 0 && p.head_dim % V == 0;
    for (const RopeHeads& h : {p.q, p.k, p.v}) {
        fits = fits && reinterpret_cast<uintptr_t>(h.in) % bytes == 0 &&
               reinterpret_cast<uintptr_t>(h.out) % bytes == 0;
        for (const HeadStrides& s : {h.in_strides, h.out_strides})
            fits = fits && s.batch % V == 0 && s.token % V == 0 && s.head % V == 0;
    }
    return fits;
}

template <class T>
Error launch_16bit(const RopeParams& p, Stream stream) {
    if (fits(p, 8)) return launch<T, 8>(p, stream);
    if (fits(p, 4)) return launch<T, 4>(p, stream);
    return launch<T, 1>(p, stream);
}

Error launch_rope(const RopeParams& p, Stream stream) {
    if (p.num_tokens == 0 || p.q.num_heads + p.k.num_heads == 0) return cudaSuccess;
    if (p.dtype == DType::kFloat16) return launch_16bit<__half>(p, stream);
    if (p.dtype == DType::kBFloat16) return launch_16bit<__nv_bfloat16>(p, stream);
    return fits(p, 4) ? launch<float, 4>(p, stream) : launch<float, 1>(p, stream);
}

}  // namespace vlmkernels
