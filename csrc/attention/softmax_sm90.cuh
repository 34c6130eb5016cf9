// Softmax on wgmma accumulators: a thread holds two rows (halves), lane / 4 and 8 below, of which
// the lanes of a quad share the columns.
#pragma once

#include "attention/sequence.cuh"
#include "common/mma.cuh"
#include "common/softmax.cuh"

namespace vlmkernels {

struct RowSoftmax {
    float max[2] = {negative_infinity(), negative_infinity()};  // of the scores so far
    float sum[2] = {0, 0};  // of exp2(scale_log2 (score - max)), this lane's columns only

    // Turns scores into exp2(scale_log2 (score - max)); what was summed before them is to be
    // multiplied by correction. kMasked: there may be rows that have seen nothing yet.
    template <bool kMasked, int kN>
    __device__ void update(float (&scores)[kN][4], float scale_log2, float (&correction)[2]) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int a = half * 2, b = a + 1;
            float even = max[half], odd = scores[0][b];  // two chains: latency
#pragma unroll
            for (int n = 0; n < kN; ++n) {
                even = fmaxf(even, scores[n][a]);
                if (n > 0) odd = fmaxf(odd, scores[n][b]);
            }
            const float new_max = quad_max(fmaxf(even, odd));
            // Of nothing any finite offset gives exp2(-inf) = 0.
            const float offset =
                kMasked && new_max == negative_infinity() ? 0 : new_max * scale_log2;
            correction[half] = exp2_approx(max[half] * scale_log2 - offset);
            max[half] = new_max;
            even = odd = 0;
#pragma unroll
            for (int n = 0; n < kN; ++n) {
                scores[n][a] = exp2_approx(scores[n][a] * scale_log2 - offset);
                scores[n][b] = exp2_approx(scores[n][b] * scale_log2 - offset);
                even += scores[n][a];
                odd += scores[n][b];
            }
            sum[half] = sum[half] * correction[half] + (even + odd);
        }
    }
    __device__ void finish() {  // completes the sums
        sum[0] = quad_sum(sum[0]);
        sum[1] = quad_sum(sum[1]);
    }
    // 1 / sum, 0 for a row that saw no key.
    __device__ float inverse_sum(int half) const {
        return sum[half] > 0 ? 1 / sum[half] : sum[half];
    }
    __device__ float lse(int half, float softmax_scale) const {
        return sum[half] == 0 ? negative_infinity() : max[half] * softmax_scale + logf(sum[half]);
    }
};

// Sets the scores of keys col0.. that rows row and row + 8 must not see to -inf.
template <int kN>
__device__ void mask_rows(float (&scores)[kN][4], const Sequence& sequence, int row, int col0) {
    const int column = col0 + threadIdx.x % 4 * 2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int limit = sequence.visible_keys(row + half * 8) - column;
#pragma unroll
        for (int n = 0; n < kN; ++n)
#pragma unroll
            for (int e = 0; e < 2; ++e)
                if (n * 8 + e >= limit) scores[n][half * 2 + e] = negative_infinity();
    }
}

// The same where rows are keys and columns queries.
template <int kN>
__device__ void mask_columns(float (&scores)[kN][4], const Sequence& sequence, int row, int col0) {
    const int column = col0 + threadIdx.x % 4 * 2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int first = sequence.first_query(row + half * 8) - column;
#pragma unroll
        for (int n = 0; n < kN; ++n)
#pragma unroll
            for (int e = 0; e < 2; ++e)
                if (n * 8 + e < first) scores[n][half * 2 + e] = negative_infinity();
    }
}

template <class T, int kN>
__device__ void pack_probabilities(uint32_t (&probs)[kN / 2][4], const float (&scores)[kN][4]) {
#pragma unroll
    for (int i = 0; i < kN / 2; ++i) pack_a<T>(probs[i], scores[2 * i], scores[2 * i + 1]);
}

template <int kN>
__device__ void scale_rows(float (&c)[kN][4], const float (&factor)[2]) {
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) c[n][e] *= factor[e / 2];
}

// Transposes 4 x 4 words within each quad: word i of lane j becomes word j of lane i.
__device__ inline void transpose_quad(uint32_t (&x)[4], int lane) {
#pragma unroll
    for (int distance = 1; distance <= 2; distance *= 2) {
        const bool upper = lane & distance;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (i & distance) continue;
            const int j = i | distance;
            const uint32_t got = __shfl_xor_sync(~0u, upper ? x[i] : x[j], distance);
            (upper ? x[i] : x[j]) = got;
        }
    }
}

// Writes one of the two rows of accumulators, 16 bytes a lane; columns from num_cols on are not
// written, nor is anything where at is null. Whole quads call it.
template <class T, int kN>
__device__ void store_row(const float (&c)[kN][4], int half, T* at, int num_cols, int lane) {
    if constexpr (std::is_same_v<T, float>) {
#pragma unroll
        for (int n = 0; n < kN; ++n)
            if (at && n * 8 < num_cols)
                *reinterpret_cast<float2*>(at + n * 8 + lane % 4 * 2) =
                    make_float2(c[n][half * 2], c[n][half * 2 + 1]);
    } else {
#pragma unroll
        for (int n0 = 0; n0 < kN; n0 += 4) {
            uint32_t words[4];
#pragma unroll
            for (int i = 0; i < 4; ++i)
                words[i] = n0 + i < kN
                               ? pack<T>(c[(n0 + i) % kN][half * 2], c[(n0 + i) % kN][half * 2 + 1])
                               : 0;
            transpose_quad(words, lane);
            const int column = (n0 + lane % 4) * 8;
            if (at && column < num_cols)
                *reinterpret_cast<uint4*>(at + column) =
                    make_uint4(words[0], words[1], words[2], words[3]);
        }
    }
}

// Rows row and row + 8 of a row-major matrix. Rows from num_rows on are not written.
template <class T, int kN>
__device__ void store_rows(const float (&c)[kN][4], T* out, int64_t row_stride, int row,
                           int num_rows, int num_cols, int lane) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int at = row + half * 8;
        store_row(c, half, at < num_rows ? out + at * row_stride : nullptr, num_cols, lane);
    }
}

}  // namespace vlmkernels
