// s(x) and s'(x) of f(x) = x s(x). F is float in CUDA code and a vector of floats on the CPU, for
// which there must be exp(F), reciprocal(F) of numbers from 1 on, magnitude(F), at_most(F, float)
// and positive_part(F); NaN passes through the last one.
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
    const F e = exp(z < 0.0f ? z : -z), r = reciprocal(e + 1.0f);
    s = z < 0.0f ? e * r : r;
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

template <class F>
VLMKERNELS_GATE void normal_distribution(F x, F& s, F& slope) {
    const F e = exp(x * x * -0.5f), tail = normal_tail(at_most(magnitude(x), kNoTail), e);
    s = x < 0.0f ? tail : 1.0f - tail;
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
        const F a = at_most(magnitude(x), kNoTail);
        return positive_part(x) - a * normal_tail(a, exp(a * a * -0.5f));
    } else {
        F s, slope;
        gate<kind>(x, s, slope);
        return x * s;
    }
}

}  // namespace
}  // namespace vlmkernels
