// Several vectors as one value: an operation goes to all of them before the next one begins, so
// that the latencies of a long chain overlap. Of 16-bit types a pair of vectors holds the even and
// the odd lanes of its part of the memory, which is cheaper to convert; what is stored is in order
// again.
#pragma once

#include "common/simd.h"

namespace vlmkernels {
namespace {

constexpr int kParts = kWidth == 16 ? 4 : 2;  // as many as the registers hold

struct Vecs {
    static constexpr int kSize = kParts * kWidth;  // floats
    Vec part[kParts];
};

template <class F, class... V>
VLMKERNELS_INLINE Vecs each_part(F&& f, const V&... x) {
    Vecs y;
#pragma GCC unroll 8
    for (int i = 0; i < kParts; ++i) y.part[i] = f(x.part[i]...);
    return y;
}

#define VLMKERNELS_VECS(op)                                                             \
    VLMKERNELS_INLINE Vecs operator op(const Vecs& a, const Vecs& b) {                  \
        return each_part([](Vec x, Vec y) VLMKERNELS_INLINED { return x op y; }, a, b); \
    }                                                                                   \
    VLMKERNELS_INLINE Vecs operator op(const Vecs& a, float b) {                        \
        return each_part([b](Vec x) VLMKERNELS_INLINED { return x op b; }, a);          \
    }                                                                                   \
    VLMKERNELS_INLINE Vecs operator op(float a, const Vecs& b) {                        \
        return each_part([a](Vec x) VLMKERNELS_INLINED { return a op x; }, b);          \
    }
VLMKERNELS_VECS(+)
VLMKERNELS_VECS(-)
VLMKERNELS_VECS(*)
#undef VLMKERNELS_VECS

VLMKERNELS_INLINE Vecs at_most(const Vecs& x, float limit) {
    return each_part([limit](Vec x) VLMKERNELS_INLINED { return at_most(x, limit); }, x);
}
VLMKERNELS_INLINE Vecs at_least(const Vecs& x, float limit) {
    return each_part([limit](Vec x) VLMKERNELS_INLINED { return at_least(x, limit); }, x);
}
VLMKERNELS_INLINE Vecs times_power(const Vecs& x, const Vecs& shifted) {
    return each_part([](Vec x, Vec s) VLMKERNELS_INLINED { return times_power(x, s); }, x, shifted);
}

VLMKERNELS_INLINE Vecs load_vecs(const BFloat16* p) {
    Vecs x;
#pragma GCC unroll 8
    for (int i = 0; i < kParts; i += 2) {
        const Bits pairs = (Bits)load(reinterpret_cast<const float*>(p + i * kWidth));
        x.part[i] = (Vec)(pairs << 16);
        x.part[i + 1] = (Vec)(pairs & 0xffff0000u);
    }
    return x;
}
template <class T>
VLMKERNELS_INLINE Vecs load_vecs(const T* p) {
    Vecs x;
#pragma GCC unroll 8
    for (int i = 0; i < kParts; ++i) x.part[i] = load(p + i * kWidth);
    return x;
}

VLMKERNELS_INLINE void store(BFloat16* p, const Vecs& x) {
#pragma GCC unroll 8
    for (int i = 0; i < kParts; i += 2) {
        const Bits even = rounded_bits(x.part[i]), odd = rounded_bits(x.part[i + 1]);
        store(reinterpret_cast<float*>(p + i * kWidth), (Vec)(even >> 16 | (odd & 0xffff0000u)));
    }
}
template <class T>
VLMKERNELS_INLINE void store(T* p, const Vecs& x) {
#pragma GCC unroll 8
    for (int i = 0; i < kParts; ++i) store(p + i * kWidth, x.part[i]);
}

}  // namespace
}  // namespace vlmkernels
