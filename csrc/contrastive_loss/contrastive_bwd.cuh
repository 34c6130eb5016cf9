// The backward of a panel of rows: its tiles of s are computed again and become
//   ds = image_weight (p_row - positive) + text_weight (p_column - positive)     CLIP
//   ds = sigmoid(s) - positive                                                    SigLIP
// in 16 bits, in memory that holds one panel; then, in one launch,
//   dimage = factor ds text        (rows of this panel, complete)
//   dtext += factor ds^T image     (all texts, this panel's part of the sum)
// Panels follow each other, so that sums have one order.
#pragma once

#include <cuda_runtime.h>

#include "common/gemm.cuh"
#include "common/reduce.cuh"
#include "common/softmax.cuh"

namespace vlmkernels {

// ds is about 1 / batch: too small for fp16 without this factor, a power of two.
template <class T>
inline constexpr float kHeadroom = std::is_same_v<T, __half> ? 1024 : 1;

// What turns a product image . text into ds.
template <bool kSigmoid>
struct ContrastiveGradient {
    const float *logit_scale, *logit_bias;
    const float *image_lse, *text_lse;  // [2, num_images] from this panel on, [2, num_columns]
    int num_images;
    float image_weight, text_weight;
    int first_positive;  // column of the positive of row 0
    int num_rows, num_columns;
    float* sums;  // [2, num_sums], each added to by one thread alone
    int num_sums;

    // 8 products of a row, columns from a multiple of 8 on, become ds; adds up ds * product, and
    // ds.
    __device__ void operator()(int row, int column, float (&x)[8], float (&total)[2]) const {
        const int positive = row + first_positive - column;  // 0 to 7: it is among these
        const bool here = positive >= 0 && positive < 8;
        if (row < num_rows && column + 8 <= num_columns && !here)
            return compute<false>(row, column, -1, x, total);
        return compute<true>(row, column, positive, x, total);
    }

  private:
    // kChecked: some of the 8 may be outside, or positive.
    template <bool kChecked>
    __device__ void compute(int row, int column, int positive, float (&x)[8],
                            float (&total)[2]) const {
        const float scale = *logit_scale * kLog2e;
        // A log-sum-exp in one rounded number is enough for a ds of 16 bits.
        auto lse = [](const float* two, int count, int i) { return two[i] + two[count + i]; };
        const float offset = kSigmoid
                                 ? (logit_bias ? *logit_bias * kLog2e : 0.f)
                                 : -kLog2e * lse(image_lse, num_images, min(row, num_rows - 1));
        float columns[8];
        if constexpr (!kSigmoid)
#pragma unroll
            for (int i = 0; i < 8; ++i)
                columns[i] = lse(text_lse, num_columns,
                                 kChecked ? min(column + i, num_columns - 1) : column + i);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const float s = x[i] * scale;  // in powers of two
            const float one = kChecked && i == positive;
            float ds;
            if constexpr (kSigmoid)
                ds = __fdividef(1, 1 + exp2_approx(-s - offset)) - one;
            else
                ds = image_weight * (exp2_approx(s + offset) - one) +
                     text_weight * (exp2_approx(s - columns[i] * kLog2e) - one);
            if (kChecked && (row >= num_rows || column + i >= num_columns)) ds = 0;
            total[0] += ds * x[i];
            total[1] += ds;
            x[i] = ds;
        }
    }
};

// Writes 8 values of a row, columns a multiple of 8.
template <class T>
__device__ void put_ds(const MatrixView<T>& ds, int row, int column, const float (&x)[8]) {
    if (row >= ds.num_rows || column >= ds.num_columns) return;
    uint4 packed;
    auto* pairs = reinterpret_cast<uint32_t*>(&packed);
#pragma unroll
    for (int i = 0; i < 4; ++i)
        pairs[i] = pack<T>(x[2 * i] * kHeadroom<T>, x[2 * i + 1] * kHeadroom<T>);
    *reinterpret_cast<uint4*>(ds.data + ds.row(row) + column) = packed;
}

template <class Tile, class T, bool kSigmoid>
__global__ void __launch_bounds__(Tile::kThreads)
    contrastive_ds_kernel(const __grid_constant__ MatrixView<const T> image,
                          const __grid_constant__ MatrixView<const T> text,
                          const __grid_constant__ ContrastiveGradient<kSigmoid> gradient,
                          const __grid_constant__ MatrixView<T> ds) {
    extern __shared__ __align__(1024) unsigned char shared[];
    const int thread = threadIdx.x, tiles_m = (image.num_rows + Tile::kM - 1) / Tile::kM;
    const int m0 = blockIdx.x % tiles_m * Tile::kM, n0 = blockIdx.x / tiles_m * Tile::kN;
    typename Tile::Accumulators c = {};
    gemm<Tile, Operand::kA, Operand::kB>(c, shared_address(shared),
                                         (image.num_columns + Tile::kK - 1) / Tile::kK, thread,
                                         operand_loader<Tile, Operand::kA>(image, m0, thread),
                                         operand_loader<Tile, Operand::kB>(text, n0, thread));
    float total[2] = {};
    store<Tile>(c, reinterpret_cast<float*>(shared), thread,
                [&](int row, int column, float (&x)[8]) {
                    gradient(m0 + row, n0 + column, x, total);
                    put_ds(ds, m0 + row, n0 + column, x);
                });
    __syncthreads();
    group_sum<Tile::kThreads>(total, reinterpret_cast<float*>(shared));
    if (thread >= 2) return;
    gradient.sums[thread * gradient.num_sums + blockIdx.x] += thread ? total[1] : total[0];
}

// Writes 8 values of a row, or adds them to what is there.
__device__ inline void put_floats(const MatrixView<float>& to, int row, int column, bool grow,
                                  const float (&values)[8], float factor) {
    if (row >= to.num_rows) return;
    float* at = to.data + to.row(row) + column;
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
        float4* vector = reinterpret_cast<float4*>(at + i);
        if (to.run_bytes == 16 && column + i < to.num_columns) {
            float4 sum = grow ? *vector : float4{};
            sum.x += factor * values[i], sum.y += factor * values[i + 1];
            sum.z += factor * values[i + 2], sum.w += factor * values[i + 3];
            *vector = sum;
        } else {
#pragma unroll
            for (int k = i; k < i + 4; ++k)
                if (column + k < to.num_columns) at[k] = (grow ? at[k] : 0) + factor * values[k];
        }
    }
}

// The first CTAs compute tiles of dimage, whose sums are long, the others fill up with dtext.
template <class Tile, class T>
__global__ void __launch_bounds__(Tile::kThreads)
    contrastive_products_kernel(const __grid_constant__ MatrixView<const T> ds,
                                const __grid_constant__ MatrixView<const T> image,
                                const __grid_constant__ MatrixView<const T> text,
                                const __grid_constant__ MatrixView<float> dimage,
                                const __grid_constant__ MatrixView<float> dtext,
                                const float* factor_, const float* logit_scale, bool grow) {
    extern __shared__ __align__(1024) unsigned char shared[];
    const int thread = threadIdx.x;
    const int tiles_n = (image.num_columns + Tile::kN - 1) / Tile::kN;
    const int image_tiles = (dimage.num_rows + Tile::kM - 1) / Tile::kM * tiles_n;
    const bool by_text = int(blockIdx.x) >= image_tiles;
    const int tile = blockIdx.x - (by_text ? image_tiles : 0);
    const int m0 = tile / tiles_n * Tile::kM, n0 = tile % tiles_n * Tile::kN;
    const float factor = *factor_ * *logit_scale / kHeadroom<T>;
    typename Tile::Accumulators c = {};
    if (by_text)
        gemm<Tile, Operand::kATransposed, Operand::kBTransposed>(
            c, shared_address(shared), (ds.num_rows + Tile::kK - 1) / Tile::kK, thread,
            operand_loader<Tile, Operand::kATransposed>(ds, m0, thread),
            operand_loader<Tile, Operand::kBTransposed>(image, n0, thread));
    else
        gemm<Tile, Operand::kA, Operand::kBTransposed>(
            c, shared_address(shared), (ds.num_columns + Tile::kK - 1) / Tile::kK, thread,
            operand_loader<Tile, Operand::kA>(ds, m0, thread),
            operand_loader<Tile, Operand::kBTransposed>(text, n0, thread));
    store<Tile>(c, reinterpret_cast<float*>(shared), thread,
                [&](int row, int column, float (&values)[8]) {
                    put_floats(by_text ? dtext : dimage, m0 + row, n0 + column, by_text && grow,
                               values, factor);
                });
}

}  // namespace vlmkernels
