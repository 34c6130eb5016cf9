// Token by token: cos and sin of its pairs once, then all heads, a vector at a time.
#include <cmath>

#include "common/column_sums_cpu.h"
#include "common/rotation_cpu.h"
#include "common/simd.h"
#include "qk_norm_rope/qk_norm_rope.h"

namespace vlmkernels {
namespace {

struct Token {
    int64_t batch, token;
    alignas(64) float cosines[kMaxPairs], sines[kMaxPairs];

    Token(const Rotation& r, int64_t i) : batch(i / r.seqlen), token(i % r.seqlen) {
        load_rotation(r, i, cosines, sines);
    }
    template <class T>
    const T* head(const void* x, const HeadStrides& s, int64_t i) const {
        return static_cast<const T*>(x) + batch * s.batch + token * s.token + i * s.head;
    }
    template <class T>
    T* head(void* x, const HeadStrides& s, int64_t i) const {
        return static_cast<T*>(x) + batch * s.batch + token * s.token + i * s.head;
    }
};

void load_weight(const QkNormRopeParams& p, const NormedHeads& h, float* w) {
    dispatch_float(p.weight_dtype, [&]<class T>() { load_row<T>(h.weight, 0, p.head_dim, w); });
}

template <class T>
void forward_heads(const QkNormRopeParams& p, const NormedHeads& h, const Token& at,
                   const float* w) {
    const int n = p.rotation.num_pairs;
    for (int head = 0; head < h.num_heads; ++head) {
        const T* x = at.head<T>(h.x, h.x_strides, head);
        T* y = at.head<T>(h.out, h.out_strides, head);
        Vec squares{};
        for_each_vector(0, p.head_dim, [&](int64_t i, int count) VLMKERNELS_INLINED {
            const Vec z = load_first(x + i, count);
            squares += z * z;
        });
        const float rstd = 1.0f / std::sqrt(sum(squares) / p.head_dim + p.eps);
        for_each_vector(0, n, [&](int64_t i, int count) VLMKERNELS_INLINED {
            const Vec a = load_first(x + i, count) * rstd * load_first(w + i, count);
            const Vec b = load_first(x + n + i, count) * rstd * load_first(w + n + i, count);
            const Vec c = load_first(at.cosines + i, count), s = load_first(at.sines + i, count);
            store_first(y + i, a * c - b * s, count);
            store_first(y + n + i, b * c + a * s, count);
        });
        for_each_vector(2 * n, p.head_dim, [&](int64_t i, int count) VLMKERNELS_INLINED {
            store_first(y + i, load_first(x + i, count) * rstd * load_first(w + i, count), count);
        });
    }
}

// Adds to dweight what the heads of a token give to it.
template <class T>
void backward_heads(const QkNormRopeParams& p, const NormedHeads& h, const Token& at,
                    const float* w, float* dweight) {
    const int n = p.rotation.num_pairs;
    alignas(64) float dn[kMaxNormedHeadDim];
    for (int head = 0; head < h.num_heads; ++head) {
        const T* x = at.head<T>(h.x, h.x_strides, head);
        const T* dy = at.head<T>(h.dy, h.dy_strides, head);
        T* dx = at.head<T>(h.out, h.out_strides, head);
        for_each_vector(0, n, [&](int64_t i, int count) VLMKERNELS_INLINED {
            const Vec a = load_first(dy + i, count), b = load_first(dy + n + i, count);
            const Vec c = load_first(at.cosines + i, count), s = load_first(at.sines + i, count);
            store_first(dn + i, a * c + b * s, count);
            store_first(dn + n + i, b * c - a * s, count);
        });
        for_each_vector(2 * n, p.head_dim, [&](int64_t i, int count) VLMKERNELS_INLINED {
            store_first(dn + i, load_first(dy + i, count), count);
        });
        Vec squares{}, products{};
        for_each_vector(0, p.head_dim, [&](int64_t i, int count) VLMKERNELS_INLINED {
            const Vec z = load_first(x + i, count);
            squares += z * z;
            products += z * load_first(dn + i, count) * load_first(w + i, count);
        });
        const float rstd = 1.0f / std::sqrt(sum(squares) / p.head_dim + p.eps);
        const float along = sum(products) / p.head_dim * rstd * rstd;
        for_each_vector(0, p.head_dim, [&](int64_t i, int count) VLMKERNELS_INLINED {
            const Vec z = load_first(x + i, count), d = load_first(dn + i, count);
            store_first(dweight + i, load_first(dweight + i, count) + d * z * rstd, count);
            store_first(dx + i, rstd * (d * load_first(w + i, count) - z * along), count);
        });
    }
}

}  // namespace

template <class Isa>
void qk_norm_rope_cpu(const QkNormRopeParams& p) {
    const int64_t row = int64_t(p.q.num_heads + p.k.num_heads) * p.head_dim;
    parallel_for(p.num_tokens, 1 + (1 << 15) / (row + 1), [&](int64_t begin, int64_t end) {
        alignas(64) float q_weight[kMaxNormedHeadDim], k_weight[kMaxNormedHeadDim];
        load_weight(p, p.q, q_weight);
        load_weight(p, p.k, k_weight);
        dispatch_float(p.dtype, [&]<class T>() {
            for (int64_t i = begin; i < end; ++i) {
                const Token at(p.rotation, i);
                forward_heads<T>(p, p.q, at, q_weight);
                forward_heads<T>(p, p.k, at, k_weight);
            }
        });
    });
}

template <class Isa>
void qk_norm_rope_backward_cpu(const QkNormRopeParams& p, const ColumnSums& weights) {
    const int64_t row = int64_t(p.q.num_heads + p.k.num_heads) * p.head_dim;
    const int64_t tokens = (p.num_tokens + p.num_partials - 1) / p.num_partials;
    parallel_for(
        p.num_partials, 1 + (1 << 15) / (row * tokens + 1), [&](int64_t begin, int64_t end) {
            alignas(64) float q_weight[kMaxNormedHeadDim], k_weight[kMaxNormedHeadDim];
            load_weight(p, p.q, q_weight);
            load_weight(p, p.k, k_weight);
            for (int64_t partial = begin; partial < end; ++partial) {
                alignas(64) float dweight[2][kMaxNormedHeadDim] = {};
                const int64_t last = p.num_tokens * (partial + 1) / p.num_partials;
                dispatch_float(p.dtype, [&]<class T>() {
                    for (int64_t i = p.num_tokens * partial / p.num_partials; i < last; ++i) {
                        const Token at(p.rotation, i);
                        backward_heads<T>(p, p.q, at, q_weight, dweight[0]);
                        backward_heads<T>(p, p.k, at, k_weight, dweight[1]);
                    }
                });
                for (int which : {0, 1})
                    if (p.partials[which])
                        std::memcpy(p.partials[which] + partial * p.head_dim, dweight[which],
                                    p.head_dim * sizeof(float));
            }
        });
    column_sums(weights);
}

template void qk_norm_rope_cpu<VLMKERNELS_ISA>(const QkNormRopeParams& p);
template void qk_norm_rope_backward_cpu<VLMKERNELS_ISA>(const QkNormRopeParams& p,
                                                        const ColumnSums& weights);

}  // namespace vlmkernels
