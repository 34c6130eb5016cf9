// Token by token: cos and sin of its pairs once, then all heads.
#include "common/cpu.h"
#include "common/sincos.h"
#include "rope/rope.h"

namespace vlmkernels {
namespace {

template <class T>
void load_row(const void* x, int64_t offset, int n, float* to) {
    for (int i = 0; i < n; ++i) to[i] = to_float(static_cast<const T*>(x)[offset + i]);
}

void load_table(const RopeParams& p, int64_t b, int64_t s, float* cosines, float* sines) {
    const RopeStrides &c = p.cos_strides, &d = p.sin_strides;
    dispatch_float(p.table_dtype, [&]<class T>() {
        load_row<T>(p.cos, b * c.batch + s * c.token, p.num_pairs, cosines);
        load_row<T>(p.sin, b * d.batch + s * d.token, p.num_pairs, sines);
    });
}

void compute_rotation(const RopeParams& p, int64_t b, int64_t s, float* cosines, float* sines) {
    float position[3];
    for (int axis = 0; axis < p.num_axes; ++axis) {
        const int64_t i = axis * p.position_axis_stride + b * p.position_batch_stride +
                          s * p.position_token_stride;
        position[axis] = p.position_dtype == DType::kInt64
                             ? float(static_cast<const int64_t*>(p.position_ids)[i])
                             : float(static_cast<const int32_t*>(p.position_ids)[i]);
    }
    float angle[kMaxPairs];
    for (int i = 0; i < p.num_pairs; ++i) angle[i] = position[p.axis[i]] * p.inv_freq[i];
    for (int i = 0; i < p.num_pairs; ++i) sin_cos(angle[i], sines[i], cosines[i]);
}

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
    const RopeStrides &from = h.in_strides, &to = h.out_strides;
    const T* x = static_cast<const T*>(h.in) + b * from.batch + s * from.token;
    T* y = static_cast<T*>(h.out) + b * to.batch + s * to.token;
    const int n = p.num_pairs, rest = p.head_dim - 2 * n;
    for (int head = 0; head < h.num_heads; ++head, x += from.head, y += to.head) {
        int i = 0;
        for (; i + 16 <= n; i += 16) rotate<16>(x + i, y + i, n, c + i, d + i);
        for (; i + 8 <= n; i += 8) rotate<8>(x + i, y + i, n, c + i, d + i);
        for (; i + 4 <= n; i += 4) rotate<4>(x + i, y + i, n, c + i, d + i);
        for (; i < n; ++i) rotate<1>(x + i, y + i, n, c + i, d + i);
        if (x != y && rest) std::memcpy(y + 2 * n, x + 2 * n, rest * sizeof(T));
    }
}

}  // namespace

template <class Isa>
void rope_cpu(const RopeParams& p) {
    const int64_t row = int64_t(p.q.num_heads + p.k.num_heads) * p.head_dim;
    parallel_for(p.num_tokens, 1 + (1 << 16) / (row + 1), [&](int64_t begin, int64_t end) {
        alignas(64) float cosines[kMaxPairs], sines[kMaxPairs];
        for (int64_t token = begin; token < end; ++token) {
            const int64_t b = token / p.seqlen, s = token % p.seqlen;
            (p.position_ids ? compute_rotation : load_table)(p, b, s, cosines, sines);
            if (p.inverse)
                for (int i = 0; i < p.num_pairs; ++i) sines[i] = -sines[i];
            dispatch_float(p.dtype, [&]<class T>() {
                rotate_heads<T>(p.q, p, b, s, cosines, sines);
                rotate_heads<T>(p.k, p, b, s, cosines, sines);
            });
        }
    });
}

template void rope_cpu<VLMKERNELS_ISA>(const RopeParams& p);

}  // namespace vlmkernels
