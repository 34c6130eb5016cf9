// The gradients of vq_lookup, in one pass over the tokens, code after code: a thread owns the codes
// that it takes, so that their sums need no atomics and come out the same each time.
#include <cmath>

#include "common/simd.h"
#include "vq_lookup/vq_lookup.h"

namespace vlmkernels {
namespace {

constexpr int kCodes = 32;  // taken at once

// The gradient of distance(x, y) by x is difference (x - y) + own x.
struct Factors {
    float difference, own;
};
struct Pair {
    Factors by_z, by_code;
};

template <class T>
Pair cosine_factors(const T* z, const T* code, int dim) {
    Vec squares{}, code_squares{}, products{};
    for_each_vector(0, dim, [&](int64_t i, int count) VLMKERNELS_INLINED {
        const Vec x = load_first(z + i, count), y = load_first(code + i, count);
        squares += x * x;
        code_squares += y * y;
        products += x * y;
    });
    const double xx = sum(squares), yy = sum(code_squares), xy = sum(products);
    constexpr double kLeast = kVqShortest * kVqShortest;
    if (xx < kLeast || yy < kLeast) return {};
    const double across = 1 / std::sqrt(xx * yy), similarity = xy * across;
    return {{float(across), float(similarity / xx - across)},
            {float(across), float(similarity / yy - across)}};
}

// One token: writes its dz, adds to the sums of its code.
template <class T>
void add_token(const VqBackwardParams& p, int64_t token, float* sums) {
    const int64_t offset = token * p.dim;
    const T *z = static_cast<const T*>(p.z) + offset,
            *code = static_cast<const T*>(p.codes) + offset;
    auto from = [&](const void* rows) {
        return rows ? static_cast<const T*>(rows) + offset : nullptr;
    };
    const T *straight = from(p.to_z), *straight_code = from(p.to_code);
    T* dz = p.dz ? static_cast<T*>(p.dz) + offset : nullptr;
    const float to_z = p.ddistance ? p.ddistance[token] : 0;
    const float to_code = p.dcodebook_distance ? p.dcodebook_distance[token] : 0;
    const Pair f = p.cosine ? cosine_factors(z, code, p.dim) : Pair{{2, 0}, {2, 0}};
    const Factors by_z{f.by_z.difference * to_z, f.by_z.own * to_z};
    const Factors by_code{f.by_code.difference * to_code, f.by_code.own * to_code};
    for_each_vector(0, p.dim, [&](int64_t i, int count) VLMKERNELS_INLINED {
        const Vec x = load_first(z + i, count), y = load_first(code + i, count), d = x - y;
        if (dz) {
            Vec g = straight ? load_first(straight + i, count) : Vec{};
            if (p.ddistance) g += by_z.difference * d + by_z.own * x;
            store_first(dz + i, g, count);
        }
        if (p.dcodebook) {
            Vec g = straight_code ? load_first(straight_code + i, count) : Vec{};
            if (p.dcodebook_distance) g += by_code.own * y - by_code.difference * d;
            store_first(sums + i, load_first(sums + i, count) + g, count);
        }
    });
}

template <class T>
void finish_code(const VqBackwardParams& p, int code, const float* sums, bool any) {
    T* to = static_cast<T*>(p.dcodebook) + int64_t(code) * p.dim;
    if (!any) {
        std::memset(static_cast<void*>(to), 0, p.dim * sizeof(T));
        return;
    }
    for_each_vector(0, p.dim, [&](int64_t i, int count) VLMKERNELS_INLINED {
        store_first(to + i, load_first(sums + i, count), count);
    });
}

}  // namespace

template <class Isa>
void vq_lookup_backward_cpu(const VqBackwardParams& p) {
    const int64_t items = (p.num_codes + kCodes - 1) / kCodes;
    const int64_t work = (p.num_codes + 4 * p.num_tokens) * p.dim / items;
    parallel_take(items, 1 + (1 << 15) / (work + 1), [&](auto&& take) {
        dispatch_float(p.dtype, [&]<class T>() {
            float sums[kVqMostDim];
            for (int64_t item; (item = take()) >= 0;)
                for (int code = int(item) * kCodes;
                     code < int(item + 1) * kCodes && code < p.num_codes; ++code) {
                    const int64_t begin = p.starts[code], end = p.starts[code + 1];
                    if (begin < end) std::memset(sums, 0, p.dim * sizeof(float));
                    for (int64_t i = begin; i < end; ++i) add_token<T>(p, p.order[i], sums);
                    if (p.dcodebook) finish_code<T>(p, code, sums, begin < end);
                }
        });
    });
}

template void vq_lookup_backward_cpu<VLMKERNELS_ISA>(const VqBackwardParams& p);

}  // namespace vlmkernels
