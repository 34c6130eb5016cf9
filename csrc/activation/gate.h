// s(x) and s'(x) of f(x) = x s(x). F is float in CUDA code and vectors of floats on the CPU, for
// which there must be exp(F), exp2(F), reciprocal(F) of numbers from 1 on, magnitude(F),
// at_most(F, float), positive_part(F), through which NaN passes, and if_negative(F, F, F).
//   SiLU        s = sigmoid(x)
//   QuickGELU   s = sigmoid(1.702 x)
//   GELU tanh   s = (1 + tanh(z/2)) / 2 = sigmoid(z), z = sqrt(8/pi) (x + 0.044715 x^3)
//   GELU        s = Phi(x), the normal distribution
// Everything comes from e^-|z|, which cannot overflow and goes to 0 where s does.
#pragma once

#include "activation/activation.h"

#ifdef __CUDACC__
#define VLMKERNELS_GATE __device__ __forceinline__
#else
#define VLMKERNELS_GATE inline __attribute__((always_inline))
#endif

namespace vlmkernels {
namespace {

template <class F>
VLMKERNELS_GATE void sigmoid(F z, F& s, F& slope) {
    const F e = exp(magnitude(z) * -1.0f), r = reciprocal(e + 1.0f);
    s = if_negative(z, e * r, r);
    slope = e * r * r;
}

// Phi(-a) = e^(-a^2/2) t P(t), t = 1/(1 + 0.3 a), where e = e^(-a^2/2): relative error 1.5e-7 for
// all a >= 0. P was fitted to it by iteratively reweighted least squares.
template <class F>
VLMKERNELS_GATE F normal_tail(F a, F e) {
    const F t = reciprocal(a * 0.3f + 1.0f);
    F p = t * 0.0356769413f - 0.157211199f;
    p = p * t + 0.206366852f;
    p = p * t - 0.0536954142f;
    p = p * t + 0.128567606f;
    p = p * t + 0.0999117419f;
    p = p * t + 0.120754227f;
    p = p * t + 0.119629279f;
    return p * t * e;
}

constexpr float kNoTail = 13.25f;  // from here on e^(-a^2/2) is 0 in fp32

// log2 Phi(-a) for 0 <= a <= 12, for where e^(-a^2/2) is not wanted as well: the absolute error is
// 5e-8 up to a = 1.5, 1e-6 at 5 and below the rounding of what it is added to. Beyond 7, where
// x Phi(x) is below 1e-11, the polynomial falls faster than Phi: 5 % too low at 8, nothing at 12.
template <class F>
VLMKERNELS_GATE F log2_normal_tail(F a) {
    F q = a * -2.16852068e-8f + 6.71673061e-7f;
    q = q * a - 8.91707267e-6f;
    q = q * a + 6.42632245e-5f;
    q = q * a - 2.36896115e-4f;
    q = q * a - 9.00368389e-5f;
    q = q * a + 7.05801372e-3f;
    q = q * a - 5.25166075e-2f;
    q = q * a - 0.459196173f;
    q = q * a - 1.15110714f;
    return q * a - 0.999999948f;
}

template <class F>
VLMKERNELS_GATE void normal_distribution(F x, F& s, F& slope) {
    const F e = exp(x * x * -0.5f), tail = normal_tail(at_most(magnitude(x), kNoTail), e);
    s = if_negative(x, tail, 1.0f - tail);
    slope = e * 0.398942280f;
}

template <Activation kind, class F>
VLMKERNELS_GATE void gate(F x, F& s, F& slope) {
    if constexpr (kind == Activation::kSilu) {
        sigmoid(x, s, slope);
    } else if constexpr (kind == Activation::kQuickGelu) {
        sigmoid(x * 1.702f, s, slope);
        slope = slope * 1.702f;
    } else if constexpr (kind == Activation::kGelu) {
        normal_distribution(x, s, slope);
    } else {
        constexpr float kLinear = 1.59576912f, kCubic = 0.0713548163f;
        const F square = x * x;
        sigmoid(x * (square * kCubic + kLinear), s, slope);
        slope = slope * (square * (3.0f * kCubic) + kLinear);
    }
}

// f(x) alone.
template <Activation kind, class F>
VLMKERNELS_GATE F activate(F x) {
    if constexpr (kind == Activation::kGelu) {
        const F a = at_most(magnitude(x), 12.0f);
        return positive_part(x) - a * exp2(log2_normal_tail(a));
    } else {
        F s, slope;
        gate<kind>(x, s, slope);
        return x * s;
    }
}

}  // namespace
}  // namespace vlmkernels
