// One sweep over the tiles of s: each warp reduces its part of a tile, over columns and over rows,
// to one partial result for each of its rows and columns; contrastive_combine_kernel adds the parts
// in order. No atomics: same input, same bits.
#pragma once

#include <cuda_runtime.h>

#include "common/gemm.cuh"
#include "common/softmax.cuh"

namespace vlmkernels {

// Beyond this distance of two logits (in powers of two) exp2 of their difference is subnormal.
inline constexpr float kMaxSpread = 120;

template <int kFirst, int kLast>
__device__ float lanes_max(float x) {
#pragma unroll
    for (int offset = kFirst; offset <= kLast; offset *= 2)
        x = fmaxf(x, __shfl_xor_sync(~0u, x, offset));
    return x;
}
template <int kFirst, int kLast>
__device__ float lanes_sum(float x) {
#pragma unroll
    for (int offset = kFirst; offset <= kLast; offset *= 2) x += __shfl_xor_sync(~0u, x, offset);
    return x;
}

// log1p(e) for 0 <= e <= 1: minimax polynomial of log1p(e) / e, relative error 3e-8. (log2(1 + e)
// would lose a small e, and at SigLIP's initial bias all are small.)
__device__ inline float log1p_unit(float e) {
    float y = 0.00523268012f;
    y = fmaf(y, e, -0.0295051876f);
    y = fmaf(y, e, 0.0782258809f);
    y = fmaf(y, e, -0.136632413f);
    y = fmaf(y, e, 0.191060051f);
    y = fmaf(y, e, -0.24842982f);
    y = fmaf(y, e, 0.333190978f);
    y = fmaf(y, e, -0.499994934f);
    y = fmaf(y, e, 0.99999994f);
    return y * e;
}

// What a warp holds of a tile: rows row(i, half), columns column(j, e), values s[i][j][2 half + e].
template <int kI, int kJ>
struct WarpPart {
    using Values = float[kI][kJ][4];
    int row0, column0;  // of this lane
    int num_rows, num_columns;
    bool inside;  // all of the warp's

    __device__ WarpPart(int row, int column, int num_rows, int num_columns, int lane)
        : row0(row + lane / 4),
          column0(column + lane % 4 * 2),
          num_rows(num_rows),
          num_columns(num_columns),
          inside(row + kI * 16 <= num_rows && column + kJ * 8 <= num_columns) {}
    __device__ int row(int i, int half) const { return row0 + i * 16 + half * 8; }
    __device__ int column(int j, int e) const { return column0 + j * 8 + e; }
    // f(row, column, value) for every value of this lane.
    template <class F>
    __device__ void each(Values& s, F&& f) const {
#pragma unroll
        for (int i = 0; i < kI; ++i)
#pragma unroll
            for (int j = 0; j < kJ; ++j)
#pragma unroll
                for (int k = 0; k < 4; ++k) f(row(i, k / 2), column(j, k % 2), s[i][j][k]);
    }
};

// s in powers of two. One exponential serves row and column: both are taken from the largest value
// of the part. rows, columns: where log2(sum exp2) goes.
template <int kI, int kJ>
__device__ void store_lse_from_one_max(const WarpPart<kI, kJ>& part, float (&s)[kI][kJ][4],
                                       float max, int lane, float* rows, float* columns) {
    float column_sums[kJ][2] = {};
#pragma unroll
    for (int i = 0; i < kI; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float sum = 0;
#pragma unroll
            for (int j = 0; j < kJ; ++j)
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const float x = exp2_approx(s[i][j][half * 2 + e] - max);
                    sum += x;
                    column_sums[j][e] += x;
                }
            sum = quad_sum(sum);
            if (lane % 4 == 0) rows[part.row(i, half)] = max + log2f(sum);
        }
#pragma unroll
    for (int j = 0; j < kJ; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const float sum = lanes_sum<4, 16>(column_sums[j][e]);
            if (lane < 4) columns[part.column(j, e)] = max + log2f(sum);
        }
}

// log2(sum over count of exp2(value(n))), each value in one of the lanes kFirst..kLast apart; -inf
// where all values are.
template <int kFirst, int kLast, int kCount, class F>
__device__ float lse2(F&& value) {
    float max = negative_infinity();
#pragma unroll
    for (int n = 0; n < kCount; ++n) max = fmaxf(max, value(n));
    max = lanes_max<kFirst, kLast>(max);
    const float offset = max == negative_infinity() ? 0 : max;
    float sum = 0;
#pragma unroll
    for (int n = 0; n < kCount; ++n) sum += exp2_approx(value(n) - offset);
    return offset + log2f(lanes_sum<kFirst, kLast>(sum));
}

template <int kI, int kJ>
__device__ void store_lse(const WarpPart<kI, kJ>& part, float (&s)[kI][kJ][4], int lane,
                          float* rows, float* columns) {
    float high = negative_infinity(), low = -negative_infinity();
    part.each(s, [&](int row, int column, float& x) {
        high = fmaxf(high, x);
        low = fminf(low, x);
        if (row >= part.num_rows || column >= part.num_columns) x = negative_infinity();
    });
    high = lanes_max<1, 16>(high);
    low = -lanes_max<1, 16>(-low);
    if (part.inside && high - low <= kMaxSpread)
        return store_lse_from_one_max(part, s, high, lane, rows, columns);
#pragma unroll
    for (int i = 0; i < kI; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float lse =
                lse2<1, 2, kJ * 2>([&](int n) { return s[i][n / 2][half * 2 + n % 2]; });
            if (lane % 4 == 0 && part.row(i, half) < part.num_rows) rows[part.row(i, half)] = lse;
        }
#pragma unroll
    for (int j = 0; j < kJ; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const float lse =
                lse2<4, 16, kI * 2>([&](int n) { return s[n / 2][j][n % 2 * 2 + e]; });
            if (lane < 4 && part.column(j, e) < part.num_columns) columns[part.column(j, e)] = lse;
        }
}

// Row sums of softplus(-z s), z = 1 for a positive and -1 for a negative.
template <int kI, int kJ>
__device__ void store_softplus(const WarpPart<kI, kJ>& part, const float (&s)[kI][kJ][4],
                               int positive, int lane, float* rows) {
#pragma unroll
    for (int i = 0; i < kI; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = part.row(i, half);
            float sum = 0;
#pragma unroll
            for (int j = 0; j < kJ; ++j)
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const int column = part.column(j, e);
                    float x = s[i][j][half * 2 + e];
                    if (column == row + positive) x = -x;
                    const float loss = fmaxf(x, 0) + log1p_unit(exp2_approx(-fabsf(x) * kLog2e));
                    sum += column < part.num_columns ? loss : 0;
                }
            sum = quad_sum(sum);
            if (lane % 4 == 0 && row < part.num_rows) rows[row] = sum;
        }
}

// rows: [parts of a row, rows of the panel]; columns: [parts of a column, num_texts], CLIP only.
// positive: column of the positive of row 0, or none.
struct ContrastiveParts {
    float *rows, *columns, *positive;
    const float *logit_scale, *logit_bias;
    int first_positive;
};

template <class Tile, class T, bool kSigmoid>
__global__ void __launch_bounds__(Tile::kThreads)
    contrastive_forward_kernel(const __grid_constant__ MatrixView<const T> image,
                               const __grid_constant__ MatrixView<const T> text,
                               const __grid_constant__ ContrastiveParts parts) {
    extern __shared__ __align__(128) char shared[];
    constexpr int kI = Tile::kWarpM / 16, kJ = Tile::kWarpN / 8;
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const int tiles_m = (image.num_rows + Tile::kM - 1) / Tile::kM;
    const int m0 = blockIdx.x % tiles_m * Tile::kM, n0 = blockIdx.x / tiles_m * Tile::kN;
    typename Tile::Accumulators s = {};
    gemm<Tile, Operand::kA, Operand::kB>(s, shared_address(shared),
                                         (image.num_columns + Tile::kK - 1) / Tile::kK, thread,
                                         operand_loader<Tile, Operand::kA>(image, m0, thread),
                                         operand_loader<Tile, Operand::kB>(text, n0, thread));
    const int row0 = m0 + warp / Tile::kWarpsN * Tile::kWarpM,
              column0 = n0 + warp % Tile::kWarpsN * Tile::kWarpN;
    const WarpPart<kI, kJ> part(row0, column0, image.num_rows, text.num_rows, lane);
    const float scale = *parts.logit_scale * (kSigmoid ? 1 : kLog2e);
    const float bias = kSigmoid && parts.logit_bias ? *parts.logit_bias : 0;
    part.each(s, [&](int row, int column, float& x) {
        x = x * scale + bias;
        if (!kSigmoid && column == row + parts.first_positive && row < part.num_rows &&
            column < part.num_columns)
            parts.positive[row] = x * kLn2;
    });
    float* rows = parts.rows + int64_t(column0 / Tile::kWarpN) * image.num_rows;
    if constexpr (kSigmoid)
        store_softplus(part, s, parts.first_positive, lane, rows);
    else
        store_lse(part, s, lane, rows,
                  parts.columns + int64_t(row0 / Tile::kWarpM) * text.num_rows);
}

inline constexpr int kCombineColumns = 32, kCombineSlices = 16;

// out[i] = the sum over parts[.][i], or their log-sum-exp, of powers of two turned into one of e.
// grow: out counts as one more part.
template <bool kSigmoid>
__global__ void __launch_bounds__(kCombineColumns* kCombineSlices)
    contrastive_combine_kernel(const float* parts, int num_parts, int count, bool grow,
                               float* out) {
    __shared__ float results[kCombineSlices][kCombineColumns];
    const int i = blockIdx.x * kCombineColumns + threadIdx.x;
    const float nothing = kSigmoid ? 0 : negative_infinity();
    auto combine = [&](auto&& value, int first, int step, int end) {
        float max = 0, sum = 0;
        if constexpr (!kSigmoid) {
            max = negative_infinity();
            for (int n = first; n < end; n += step) max = fmaxf(max, value(n));
            if (max == negative_infinity()) max = 0;
        }
        for (int n = first; n < end; n += step)
            sum += kSigmoid ? value(n) : exp2_approx(value(n) - max);
        return kSigmoid ? sum : max + log2f(sum);
    };
    float result = nothing;
    if (i < count)
        result = combine([&](int n) { return parts[int64_t(n) * count + i]; }, threadIdx.y,
                         kCombineSlices, num_parts);
    results[threadIdx.y][threadIdx.x] = result;
    __syncthreads();
    if (threadIdx.y || i >= count) return;
    const float before = grow ? out[i] * (kSigmoid ? 1 : kLog2e) : nothing;
    result = combine([&](int n) { return n ? results[n - 1][threadIdx.x] : before; }, 0, 1,
                     kCombineSlices + 1);
    out[i] = result * (kSigmoid ? 1 : kLn2);
}

}  // namespace vlmkernels
