// One sweep over the tiles of s: each warp reduces its part of a tile, over columns and over rows,
// to one partial result for each of its rows and columns; combine kernels add the parts in order.
// No atomics: same input, same bits.
#pragma once

#include <cuda_runtime.h>

#include "common/gemm.cuh"
#include "common/softmax.cuh"

namespace vlmkernels {

// Beyond this distance of two logits (in powers of two) exp2 of their difference is subnormal.
inline constexpr float kMaxSpread = 120;

// A log-sum-exp in powers of two, max + log2(sum): kept apart, so that a large maximum takes no
// digits from the sum. -inf and 0: of nothing.
struct Lse {
    float max, sum;
};

// Of count of them.
template <class F>
__device__ Lse merge(int count, F&& part) {
    Lse all{negative_infinity(), 0};
#pragma unroll 4
    for (int n = 0; n < count; ++n) all.max = fmaxf(all.max, part(n).max);
    const float offset = all.max == negative_infinity() ? 0 : all.max;
#pragma unroll 4
    for (int n = 0; n < count; ++n) all.sum += part(n).sum * exp2_approx(part(n).max - offset);
    return all;
}

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

// What a warp holds of a tile of s: this lane's rows row(m) and columns column(n).
template <int kI, int kJ>
struct WarpLogits {
    static constexpr int kRows = 2 * kI, kColumns = 2 * kJ;
    const float (&products)[kI][kJ][4];
    float scale, bias;
    int row0, column0;  // of this lane
    int num_rows, num_columns;
    bool inside;  // all of the warp's

    __device__ WarpLogits(const float (&products)[kI][kJ][4], float scale, float bias, int row,
                          int column, int num_rows, int num_columns, int lane)
        : products(products),
          scale(scale),
          bias(bias),
          row0(row + lane / 4),
          column0(column + lane % 4 * 2),
          num_rows(num_rows),
          num_columns(num_columns),
          inside(row + kI * 16 <= num_rows && column + kJ * 8 <= num_columns) {}
    __device__ int row(int m) const { return row0 + m * 8; }
    __device__ int column(int n) const { return column0 + n / 2 * 8 + n % 2; }
    __device__ bool has_diagonal(int first_positive) const {  // false: surely not
        const int first = row0 - column0 + first_positive;
        return first >= -kI * 16 && first <= kJ * 8;
    }
    __device__ float product(int m, int n) const {
        return products[m / 2][n / 2][m % 2 * 2 + n % 2];
    }
    __device__ float at(int m, int n) const { return product(m, n) * scale + bias; }
    // From here on logits are computed anew: only products stay in registers.
    __device__ void forget() { asm volatile("" : "+f"(scale), "+r"(row0), "+r"(column0)); }
    // The same where ptxas, which sees through that, would keep them: it does not see through this.
    __device__ void recompute() {
        forget();
        scale = __shfl_sync(~0u, scale, 0);
    }
    __device__ float masked(int m, int n) const {  // -inf outside
        return row(m) < num_rows && column(n) < num_columns ? at(m, n) : negative_infinity();
    }
};

// Adds x[n] over the lanes 4, 8 and 16 apart; 1/8 of the sums stays in each lane: x[n] of the
// first kCount / 8 is that of number first + n, first being returned.
template <int kCount, int kOffset = 16>
__device__ int scatter_sums(float (&x)[kCount], int lane) {
    constexpr int kHalf = kCount * kOffset / 32;
    const bool upper = lane & kOffset;
#pragma unroll
    for (int n = 0; n < kHalf; ++n) {
        const float mine = upper ? x[n + kHalf] : x[n], other = upper ? x[n] : x[n + kHalf];
        x[n] = mine + __shfl_xor_sync(~0u, other, kOffset);
    }
    const int first = upper ? kHalf : 0;
    if constexpr (kOffset > 4)
        return first + scatter_sums<kCount, kOffset / 2>(x, lane);
    else
        return first;
}

// s in powers of two. One exponential serves row and column: both are taken from the largest value
// of the part. row(row, lse), column(column, lse) get the results.
template <int kI, int kJ, class Row, class Column>
__device__ void lse_from_one_max(WarpLogits<kI, kJ> s, float max, int lane, Row&& row,
                                 Column&& column) {
    s.bias -= max;
    constexpr int kAtOnce = 8;  // columns
    float row_sums[kI * 2] = {};
#pragma unroll
    for (int n0 = 0; n0 < kJ * 2; n0 += kAtOnce) {
        float column_sums[kAtOnce];
#pragma unroll
        for (int n = 0; n < kAtOnce; ++n) {
            column_sums[n] = 0;
#pragma unroll
            for (int m = 0; m < kI * 2; ++m) {
                const float x = exp2_approx(s.at(m, n0 + n));
                row_sums[m] += x;
                column_sums[n] += x;
            }
        }
        const int first = scatter_sums(column_sums, lane);
#pragma unroll
        for (int n = 0; n < kAtOnce / 8; ++n)
            column(s.column(n0 + first + n), Lse{max, column_sums[n]});
    }
#pragma unroll
    for (int m = 0; m < kI * 2; ++m) {
        const float sum = quad_sum(row_sums[m]);
        if (lane % 4 == 0) row(s.row(m), Lse{max, sum});
    }
}

// Of count values of each of the lanes 4, 8 and 16 apart.
template <int kCount, class F>
__device__ Lse column_lse(F&& value) {
    float max = negative_infinity(), sum = 0;
#pragma unroll
    for (int n = 0; n < kCount; ++n) max = fmaxf(max, value(n));
    max = lanes_max<4, 16>(max);
    const float offset = max == negative_infinity() ? 0 : max;
#pragma unroll
    for (int n = 0; n < kCount; ++n) sum += exp2_approx(value(n) - offset);
    return {max, lanes_sum<4, 16>(sum)};
}

// The same from each row's and each column's own maximum.
template <int kI, int kJ, class Row, class Column>
__device__ void lse_from_all_max(WarpLogits<kI, kJ> s, int lane, Row&& row, Column&& column) {
#pragma unroll
    for (int m = 0; m < kI * 2; ++m) {
        float max = negative_infinity(), sum = 0;
#pragma unroll
        for (int n = 0; n < kJ * 2; ++n) max = fmaxf(max, s.masked(m, n));
        max = quad_max(max);
        s.recompute();
        const float offset = max == negative_infinity() ? 0 : max;
#pragma unroll
        for (int n = 0; n < kJ * 2; ++n) sum += exp2_approx(s.masked(m, n) - offset);
        sum = quad_sum(sum);
        if (lane % 4 == 0 && s.row(m) < s.num_rows) row(s.row(m), Lse{max, sum});
        s.recompute();
    }
#pragma unroll
    for (int n = 0; n < kJ * 2; ++n) {
        if (n % 4 == 0) s.forget();
        const Lse lse = column_lse<kI * 2>([&](int m) { return s.masked(m, n); });
        if (lane < 4 && s.column(n) < s.num_columns) column(s.column(n), lse);
    }
}

// Log-sum-exps of the rows and columns of a part, to row(row, lse) and column(column, lse).
template <int kI, int kJ, class Row, class Column>
__device__ void part_lse(WarpLogits<kI, kJ> s, int lane, Row&& row, Column&& column) {
    if (s.inside) {
        float high = negative_infinity(), low = -negative_infinity();  // of products
#pragma unroll
        for (int m = 0; m < kI * 2; ++m)
#pragma unroll
            for (int n = 0; n < kJ * 2; ++n) {
                high = fmaxf(high, s.product(m, n));
                low = fminf(low, s.product(m, n));
            }
        high = lanes_max<1, 16>(high);
        low = -lanes_max<1, 16>(-low);
        const float one = high * s.scale + s.bias, other = low * s.scale + s.bias;
        high = fmaxf(one, other), low = fminf(one, other);
        s.forget();
        if (high - low <= kMaxSpread) return lse_from_one_max(s, high, lane, row, column);
    }
    lse_from_all_max(s, lane, row, column);
}

// Row sums of softplus(-z s), z = 1 for a positive and -1 for a negative, to row(row, sum).
template <int kI, int kJ, class Row>
__device__ void part_softplus(const WarpLogits<kI, kJ>& s, int first_positive, int lane,
                              Row&& row) {
#pragma unroll
    for (int m = 0; m < kI * 2; ++m) {
        float sum = 0;
#pragma unroll
        for (int n = 0; n < kJ * 2; ++n) {
            float x = s.at(m, n);
            if (s.column(n) == s.row(m) + first_positive) x = -x;
            const float loss = fmaxf(x, 0) + log1p_unit(exp2_approx(-fabsf(x) * kLog2e));
            sum += s.column(n) < s.num_columns ? loss : 0;
        }
        sum = quad_sum(sum);
        if (lane % 4 == 0 && s.row(m) < s.num_rows) row(s.row(m), sum);
    }
}

// rows: [parts of a row, rows of the panel]; columns: [parts of a column, num_texts], CLIP only.
template <bool kSigmoid>
struct ContrastiveParts {
    using Part = std::conditional_t<kSigmoid, float, Lse>;
    Part *rows, *columns;
    float* positive;
    const float *logit_scale, *logit_bias;
    int first_positive;  // column of the positive of row 0

    // s: natural for SigLIP, in powers of two for CLIP.
    __device__ float scale() const { return *logit_scale * (kSigmoid ? 1 : kLog2e); }
    __device__ float bias() const { return kSigmoid && logit_bias ? *logit_bias : 0; }
    template <int kI, int kJ>
    __device__ void store_positives(const WarpLogits<kI, kJ>& s) const {
        if (!s.has_diagonal(first_positive)) return;
#pragma unroll
        for (int m = 0; m < kI * 2; ++m)
#pragma unroll
            for (int n = 0; n < kJ * 2; ++n)
                if (s.column(n) == s.row(m) + first_positive && s.row(m) < s.num_rows &&
                    s.column(n) < s.num_columns)
                    positive[s.row(m)] = s.product(m, n) * *logit_scale;
    }
};

template <class Tile, class T, bool kSigmoid>
__global__ void __launch_bounds__(Tile::kThreads)
    contrastive_forward_kernel(const __grid_constant__ MatrixView<const T> image,
                               const __grid_constant__ MatrixView<const T> text,
                               const __grid_constant__ ContrastiveParts<kSigmoid> parts) {
    extern __shared__ __align__(1024) unsigned char shared[];
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const int tiles_m = (image.num_rows + Tile::kM - 1) / Tile::kM;
    const int m0 = blockIdx.x % tiles_m * Tile::kM, n0 = blockIdx.x / tiles_m * Tile::kN;
    typename Tile::Accumulators c = {};
    gemm<Tile, Operand::kA, Operand::kB>(c, shared_address(shared),
                                         (image.num_columns + Tile::kK - 1) / Tile::kK, thread,
                                         operand_loader<Tile, Operand::kA>(image, m0, thread),
                                         operand_loader<Tile, Operand::kB>(text, n0, thread));
    const int row0 = m0 + warp / Tile::kWarpsN * Tile::kWarpM,
              column0 = n0 + warp % Tile::kWarpsN * Tile::kWarpN;
    const WarpLogits s(c, parts.scale(), parts.bias(), row0, column0, image.num_rows, text.num_rows,
                       lane);
    auto* rows = parts.rows + int64_t(column0 / Tile::kWarpN) * image.num_rows;
    auto row = [&](int row, auto result) { rows[row] = result; };
    if constexpr (kSigmoid) {
        part_softplus(s, parts.first_positive, lane, row);
    } else {
        parts.store_positives(s);
        Lse* columns = parts.columns + int64_t(row0 / Tile::kWarpM) * text.num_rows;
        part_lse(s, lane, row, [&](int column, Lse lse) { columns[column] = lse; });
    }
}

inline constexpr int kCombineColumns = 32, kCombineSlices = 16;

// result(i, all): all the parts[.][i] added up; merge(count, part) adds some.
template <class Part, class Merge, class Result>
__device__ void combine(const Part* parts, int num_parts, int count, Merge&& merge,
                        Result&& result) {
    __shared__ Part slices[kCombineSlices][kCombineColumns];
    const int i = blockIdx.x * kCombineColumns + threadIdx.x, first = threadIdx.y;
    if (i < count) {
        const int mine = (num_parts - first + kCombineSlices - 1) / kCombineSlices;
        slices[first][threadIdx.x] = merge(
            mine, [&](int n) { return parts[int64_t(first + n * kCombineSlices) * count + i]; });
    }
    __syncthreads();
    if (threadIdx.y || i >= count) return;
    result(i, merge(kCombineSlices, [&](int n) { return slices[n][threadIdx.x]; }));
}

static __global__ void __launch_bounds__(kCombineColumns* kCombineSlices)
    contrastive_combine_losses_kernel(const float* parts, int num_parts, int count, float* out) {
    auto add = [](int count, auto&& part) {
        float sum = 0;
        for (int n = 0; n < count; ++n) sum += part(n);
        return sum;
    };
    combine(parts, num_parts, count, add, [&](int i, float sum) { out[i] = sum; });
}

// out: [2, stride]. grow: it holds the result of the parts before, in powers of two, as it will
// where these are not the last.
static __global__ void __launch_bounds__(kCombineColumns* kCombineSlices)
    contrastive_combine_lse_kernel(const Lse* parts, int num_parts, int count,
                                   const float* logit_scale, bool grow, bool last, float* out,
                                   int stride) {
    auto add = [](int count, auto&& part) { return merge(count, part); };
    combine(parts, num_parts, count, add, [&](int i, Lse lse) {
        if (grow) {
            const Lse now = lse, before{out[i], out[stride + i]};
            lse = merge(2, [&](int n) { return n ? now : before; });
        }
        if (last) {
            // To powers of e, of logits that were multiplied by the rounded scale log2(e).
            const float scale = *logit_scale, scale2 = scale * kLog2e;
            const float ln2_rest = scale2 == 0 ? 0 : fmaf(-scale2, kLn2, scale) / scale2;
            const float max = lse.max * kLn2, rest = fmaf(lse.max, kLn2, -max);
            lse = {max, log2f(lse.sum) * kLn2 + fmaf(lse.max, ln2_rest, rest)};
        }
        out[i] = lse.max;
        out[stride + i] = lse.sum;
    });
}

}  // namespace vlmkernels
