// Online softmax over the accumulators of m16n8k16: each quad of lanes shares rows lane / 4 and
// lane / 4 + 8 of each 16-row tile.
#pragma once

#include "common/ptx.cuh"

namespace vlmkernels {

inline constexpr float kLog2e = 1.4426950408889634f;
inline constexpr float kLn2 = 0.6931471805599453f;

__device__ inline float negative_infinity() { return -__int_as_float(0x7f800000); }

__device__ inline float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
    return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
__device__ inline float quad_sum(float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}

template <int kM>
struct OnlineSoftmax {
    float max[kM][2];  // of the scores so far
    float sum[kM][2];  // of exp2(scale_log2 (score - max)), this lane's columns only

    __device__ OnlineSoftmax() {
#pragma unroll
        for (int m = 0; m < kM; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half)
                max[m][half] = negative_infinity(), sum[m][half] = 0;
    }

    // Turns scores into exp2(scale_log2 (score - max)) and rescales out to the new max.
    template <int kN, int kD>
    __device__ void update(float (&scores)[kM][kN][4], float (&out)[kM][kD][4], float scale_log2) {
#pragma unroll
        for (int m = 0; m < kM; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float new_max = max[m][half];
#pragma unroll
                for (int n = 0; n < kN; ++n)
                    new_max =
                        fmaxf(new_max, fmaxf(scores[m][n][half * 2], scores[m][n][half * 2 + 1]));
                new_max = quad_max(new_max);
                // A row that has seen nothing yet: any finite offset gives exp2(-inf) = 0.
                const float offset = new_max == negative_infinity() ? 0 : new_max * scale_log2;
                const float correction = exp2_approx(max[m][half] * scale_log2 - offset);
                max[m][half] = new_max;
                float row_sum = 0;
#pragma unroll
                for (int n = 0; n < kN; ++n)
#pragma unroll
                    for (int e = half * 2; e < half * 2 + 2; ++e) {
                        scores[m][n][e] = exp2_approx(scores[m][n][e] * scale_log2 - offset);
                        row_sum += scores[m][n][e];
                    }
                sum[m][half] = sum[m][half] * correction + row_sum;
                if (__any_sync(~0u, correction != 1))  // seldom, after the first blocks
#pragma unroll
                    for (int d = 0; d < kD; ++d)
                        out[m][d][half * 2] *= correction, out[m][d][half * 2 + 1] *= correction;
            }
    }

    // Completes the sums over the quad.
    __device__ void finish() {
#pragma unroll
        for (int m = 0; m < kM; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half) sum[m][half] = quad_sum(sum[m][half]);
    }
    // 1 / sum, 0 for a row that saw no key.
    __device__ float inverse_sum(int m, int half) const {
        return sum[m][half] > 0 ? 1 / sum[m][half] : sum[m][half];
    }
    __device__ float lse(int m, int half, float softmax_scale) const {
        return sum[m][half] == 0 ? negative_infinity()
                                 : max[m][half] * softmax_scale + logf(sum[m][half]);
    }
};

}  // namespace vlmkernels
