// Vectors of the instruction set that this copy of a CPU kernel is compiled for (see isa.h): loads
// and stores that convert 16-bit floats, exp, and a transpose in registers.
#pragma once

#include <utility>

#include "common/cpu.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace vlmkernels {
namespace {

#if defined(__AVX512F__)
constexpr int kWidth = 16;  // floats in a vector
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

typedef float Vec __attribute__((vector_size(kWidth * 4)));
typedef uint32_t Bits __attribute__((vector_size(kWidth * 4)));
typedef uint16_t HalfBits __attribute__((vector_size(kWidth * 2)));

#define VLMKERNELS_INLINED __attribute__((always_inline))  // after the arguments of a lambda
#define VLMKERNELS_INLINE inline VLMKERNELS_INLINED

template <uint32_t... i>
constexpr Bits lanes_of(std::integer_sequence<uint32_t, i...>) {
    return Bits{i...};
}
constexpr Bits kLanes = lanes_of(std::make_integer_sequence<uint32_t, kWidth>());  // 0, 1, 2, ...

VLMKERNELS_INLINE Vec splat(float x) { return x - Vec{}; }

VLMKERNELS_INLINE HalfBits load_bits(const void* p) {
    HalfBits bits;
    std::memcpy(&bits, p, sizeof bits);
    return bits;
}
VLMKERNELS_INLINE Vec load(const float* p) {
    Vec x;
    std::memcpy(&x, p, sizeof x);
    return x;
}
// By hand where it matters: gcc goes by halves of the vector.
VLMKERNELS_INLINE Bits widen(HalfBits x) {
#if defined(__AVX512F__)
    return (Bits)_mm512_cvtepu16_epi32((__m256i)x);
#else
    return __builtin_convertvector(x, Bits);
#endif
}
VLMKERNELS_INLINE HalfBits narrow(Bits x) {
#if defined(__AVX512F__)
    return (HalfBits)_mm512_cvtepi32_epi16((__m512i)x);
#else
    return __builtin_convertvector(x, HalfBits);
#endif
}
VLMKERNELS_INLINE Vec load(const BFloat16* p) { return (Vec)(widen(load_bits(p)) << 16); }
VLMKERNELS_INLINE Vec load(const Half* p) {
#if defined(__AVX512F__)
    return _mm512_cvtph_ps((__m256i)load_bits(p));
#elif defined(__AVX2__)
    return _mm256_cvtph_ps((__m128i)load_bits(p));
#else
    Vec x;
    for (int i = 0; i < kWidth; ++i) x[i] = to_float(p[i]);
    return x;
#endif
}

VLMKERNELS_INLINE void store(float* p, Vec x) { std::memcpy(p, &x, sizeof x); }
// The upper half of each lane is x as a bfloat16, rounded to nearest even; NaN stays NaN.
VLMKERNELS_INLINE Bits rounded_bits(Vec x) {
    const Bits bits = (Bits)x, up = ((bits >> 16) & 1) + 0x7fff;
#if defined(__AVX512F__)
    const __mmask16 ordered = _mm512_cmp_ps_mask((__m512)x, (__m512)x, _CMP_ORD_Q);
    const __m512i nan = _mm512_set1_epi32(0x7fc00000);
    return (Bits)_mm512_mask_add_epi32(nan, ordered, (__m512i)bits, (__m512i)up);
#else
    return x == x ? bits + up : Bits{} + 0x7fc00000;
#endif
}
VLMKERNELS_INLINE void store(BFloat16* p, Vec x) {
    HalfBits y = narrow(rounded_bits(x) >> 16);
    std::memcpy(p, &y, sizeof y);
}
VLMKERNELS_INLINE void store(Half* p, Vec x) {
#if defined(__AVX512F__)
    HalfBits y = (HalfBits)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT);
    std::memcpy(p, &y, sizeof y);
#elif defined(__AVX2__)
    HalfBits y = (HalfBits)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT);
    std::memcpy(p, &y, sizeof y);
#else
    for (int i = 0; i < kWidth; ++i) p[i] = from_float<Half>(x[i]);
#endif
}

// The first n lanes from memory, the others zero; nothing beyond them is read.
template <class T>
VLMKERNELS_INLINE Vec load_first(const T* p, int64_t n) {
    if (n >= kWidth) return load(p);
    T lanes[kWidth] = {};
    for (int64_t i = 0; i < n; ++i) lanes[i] = p[i];
    return load(lanes);
}
template <class T>
VLMKERNELS_INLINE void store_first(T* p, Vec x, int64_t n) {
    if (n >= kWidth) return store(p, x);
    T lanes[kWidth];
    store(lanes, x);
    for (int64_t i = 0; i < n; ++i) p[i] = lanes[i];
}

// f(i, count) over [begin, end): whole vectors from i on, then what is left.
template <class F>
VLMKERNELS_INLINE void for_each_vector(int64_t begin, int64_t end, F&& f) {
    int64_t i = begin;
    for (; i + kWidth <= end; i += kWidth) f(i, kWidth);
    if (i < end) f(i, int(end - i));
}

VLMKERNELS_INLINE Vec max(Vec a, Vec b) {
#if defined(__AVX512F__)
    return (Vec)_mm512_max_ps((__m512)a, (__m512)b);
#else
    return a > b ? a : b;
#endif
}

VLMKERNELS_INLINE Vec min(Vec a, Vec b) {
#if defined(__AVX512F__)
    return (Vec)_mm512_min_ps((__m512)a, (__m512)b);
#else
    return a < b ? a : b;
#endif
}
// Of NaN: at_least keeps it, at_most gives the limit.
VLMKERNELS_INLINE Vec at_least(Vec x, float limit) { return max(splat(limit), x); }
VLMKERNELS_INLINE Vec at_most(Vec x, float limit) { return min(x, splat(limit)); }

VLMKERNELS_INLINE float sum(Vec x) {
    float total = 0;
    for (int i = 0; i < kWidth; ++i) total += x[i];
    return total;
}

// Where the lane's number is below n, or is n.
VLMKERNELS_INLINE auto lanes_below(int64_t n) { return kLanes < Bits{} + uint32_t(n); }
VLMKERNELS_INLINE auto lane_is(int64_t n) { return kLanes == Bits{} + uint32_t(n); }

// About 1 ulp: an approximation of 14 bits and one step of Newton's, where there is one.
VLMKERNELS_INLINE Vec reciprocal(Vec x) {
#if defined(__AVX512F__)
    const Vec y = (Vec)_mm512_rcp14_ps((__m512)x);
    return y * (2.0f - x * y);
#else
    return 1.0f / x;
#endif
}

constexpr float kLog2e = 1.44269504f;
constexpr float kRounder = 12582912.f + 127.f;  // 1.5 * 2^23: adding it rounds to an integer

// y 2^n for shifted = n + kRounder, whose low bits are the exponent.
VLMKERNELS_INLINE Vec times_power(Vec y, Vec shifted) { return y * (Vec)((Bits)shifted << 23); }

// e^x for x <= 88, about 1 ulp; exactly 0 from x = -87.7 down to -inf; NaN stays NaN. V: Vec, or
// Vecs (vecs.h).
template <class V>
VLMKERNELS_INLINE V exp(V x) {
    x = at_least(x, -88.f);
    const V shifted = x * kLog2e + kRounder;
    const V n = shifted - kRounder;
    const V f = (x - n * 0.693145752f) - n * 1.42860677e-6f;  // ln 2 in two parts
    // Minimax polynomial of e^f - 1 - f for |f| <= ln 2 / 2, relative error 3e-9.
    V y = f * 1.38143204e-3f + 8.36885109e-3f;
    y = y * f + 4.16684011e-2f;
    y = y * f + 1.66665195e-1f;
    y = y * f + 4.99999934e-1f;
    y = y * f + 1.f;
    y = y * f + 1.f;
    return times_power(y, shifted);
}

// 2^x for x < 128, relative error 1e-7; exactly 0 from x = -126.5 down to -inf; NaN stays NaN.
template <class V>
VLMKERNELS_INLINE V exp2(V x) {
    x = at_least(x, -127.f);
    const V shifted = x + kRounder;
    const V f = x - (shifted - kRounder);
    V y = f * 1.32647242e-3f + 9.67151324e-3f;
    y = y * f + 5.55073376e-2f;
    y = y * f + 2.40222421e-1f;
    y = y * f + 6.93146978e-1f;
    y = y * f + 1.f;
    return times_power(y, shifted);
}

template <int half, int... i>
VLMKERNELS_INLINE void exchange(Vec& a, Vec& b, std::integer_sequence<int, i...>) {
    Vec low = __builtin_shufflevector(a, b, ((i & half) ? i - half + kWidth : i)...);
    Vec high = __builtin_shufflevector(a, b, ((i & half) ? i + kWidth : i + half)...);
    a = low;
    b = high;
}

// Transposes a kWidth x kWidth matrix of registers: blocks of 1, 2, 4, ... change places.
template <int half = 1>
VLMKERNELS_INLINE void transpose(Vec (&rows)[kWidth]) {
    if constexpr (half < kWidth) {
#pragma GCC unroll 16
        for (int i = 0; i < kWidth; ++i)
            if (!(i & half))
                exchange<half>(rows[i], rows[i + half], std::make_integer_sequence<int, kWidth>());
        transpose<half * 2>(rows);
    }
}

// Lane i is the sum of rows[i].
template <int half = 1>
VLMKERNELS_INLINE Vec row_sums(Vec (&rows)[kWidth]) {
    if constexpr (half == kWidth) {
        return rows[0];
    } else {
#pragma GCC unroll 16
        for (int i = 0; i < kWidth; i += 2 * half) {
            exchange<half>(rows[i], rows[i + half], std::make_integer_sequence<int, kWidth>());
            rows[i] += rows[i + half];
        }
        return row_sums<half * 2>(rows);
    }
}

}  // namespace
}  // namespace vlmkernels
