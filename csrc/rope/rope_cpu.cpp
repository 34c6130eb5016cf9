// Token by token: cos and sin of its pairs once, then all heads.
#include "common/rotation_cpu.h"
#include "rope/rope.h"

namespace vlmkernels {
namespace {

// Rotates kCount pairs, whose second elements lie `half` further on. x and y may be the same.
template <int kCount, class T>
inline void rotate(const T* x, T* y, int half, const float* c, const float* s) {
#pragma GCC ivdep
    for (int i = 0; i < kCount; ++i) {
        const float a = to_float(x[i]), b = to_float(x[i + half]);
        y[i] = from_float<T>(a * c[i] - b * s[i]);
        y[i + half] = from_float<T>(b * c[i] + a * s[i]);
    }
}

template <class T>
void rotate_heads(const RopeHeads& h, const RopeParams& p, int64_t b, int64_t s, const float* c,
                  const float* d) {
    const HeadStrides &from = h.in_strides, &to = h.out_strides;
    const T* x = static_cast<const T*>(h.in) + b * from.batch + s * from.token;
    T* y = static_cast<T*>(h.out) + b * to.batch + s * to.token;
    const int n = p.rotation.num_pairs, rest = p.head_dim - 2 * n;
    for (int head = 0; head < h.num_heads; ++head, x += from.head, y += to.head) {
        int i = 0;
        for (; i + 16 <= n; i += 16) rotate<16>(x + i, y + i, n, c + i, d + i);
        for (; i + 8 <= n; i += 8) rotate<8>(x + i, y + i, n, c + i, d + i);
        for (; i + 4 <= n; i += 4) rotate<4>(x + i, y + i, n, c + i, d + i);
        for (; i < n; ++i) rotate<1>(x + i, y + i, n, c + i, d + i);
        if (x != y && rest) std::memcpy(y + 2 * n, x + 2 * n, rest * sizeof(T));
    }
}

template <class T>
void copy_heads(const RopeHeads& h, const RopeParams& p, int64_t b, int64_t s) {
    const HeadStrides &from = h.in_strides, &to = h.out_strides;
    const T* x = static_cast<const T*>(h.in) + b * from.batch + s * from.token;
    T* y = static_cast<T*>(h.out) + b * to.batch + s * to.token;
    for (int head = 0; head < h.num_heads; ++head, x += from.head, y += to.head)
        std::memcpy(y, x, p.head_dim * sizeof(T));
}

}  // namespace

template <class Isa>
void rope_cpu(const RopeParams& p) {
    const int heads = p.q.num_heads + p.k.num_heads + p.v.num_heads;
    const int64_t row = int64_t(heads) * p.head_dim;
    parallel_for(p.num_tokens, 1 + (1 << 16) / (row + 1), [&](int64_t begin, int64_t end) {
        alignas(64) float cosines[kMaxPairs], sines[kMaxPairs];
        for (int64_t token = begin; token < end; ++token) {
            const int64_t b = token / p.rotation.seqlen, s = token % p.rotation.seqlen;
            load_rotation(p.rotation, token, cosines, sines);
            dispatch_float(p.dtype, [&]<class T>() {
                rotate_heads<T>(p.q, p, b, s, cosines, sines);
                rotate_heads<T>(p.k, p, b, s, cosines, sines);
                copy_heads<T>(p.v, p, b, s);
            });
        }
    });
}

template void rope_cpu<VLMKERNELS_ISA>(const RopeParams& p);

}  // namespace vlmkernels
