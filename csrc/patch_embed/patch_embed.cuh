// The three matrix products of patch_embed. A CTA computes one tile of the result; tiles of one
// row of tiles are neighbours in the grid, so that they share the patches through L2.
//   forward   y (patches, hidden_dim)  = x weight^T, then bias and pos_embed, then the one rounding
//   dx        dx (patches, patch_dim)  = dy weight, each pixel written once
//   dweight   (hidden_dim, patch_dim)  = dy^T x, the sum over patches in num_splits parts, and
//             dbias = the row sums of dy^T
#pragma once

#include <cuda_runtime.h>

#include "common/grid.cuh"
#include "patch_embed/patches.cuh"

namespace vlmkernels {

template <class T>
struct PatchEmbedEpilogue {
    MatrixView<T> y;
    MatrixView<const T> bias;  // one row, or none
    const float* float_bias;   // or null
    MatrixView<const T> pos_embed;
    FastDivide positions;
    float scale;  // of the product

    __device__ void operator()(int row, int column, float (&values)[8]) const {
        if (row >= y.num_rows) return;
#pragma unroll
        for (float& value : values) value *= scale;
        uint32_t position = row;
        positions(position);
        add_values(bias, 0, column, values);
        if (float_bias) add_float_bias(column, values);
        add_values(pos_embed, int(position), column, values);
        store_values(y, row, column, values);
    }
    // float_bias: 16-byte aligned.
    __device__ void add_float_bias(int column, float (&values)[8]) const {
        if (column + 8 <= y.num_columns) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float4 four =
                    *reinterpret_cast<const float4*>(float_bias + column + half * 4);
                values[half * 4] += four.x, values[half * 4 + 1] += four.y;
                values[half * 4 + 2] += four.z, values[half * 4 + 3] += four.w;
            }
        } else {
#pragma unroll
            for (int i = 0; i < 8; ++i)
                if (column + i < y.num_columns) values[i] += float_bias[column + i];
        }
    }
};

template <class Tile, class View, class T>
__global__ void __launch_bounds__(Tile::kThreads)
    patch_embed_kernel(const __grid_constant__ View x,
                       const __grid_constant__ MatrixView<const T> weight,
                       const __grid_constant__ PatchEmbedEpilogue<T> epilogue) {
    extern __shared__ __align__(128) char shared[];
    const int thread = threadIdx.x, tiles_n = (weight.num_rows + Tile::kN - 1) / Tile::kN;
    const int m0 = blockIdx.x / tiles_n * Tile::kM, n0 = blockIdx.x % tiles_n * Tile::kN;
    typename Tile::Accumulators c = {};
    gemm<Tile, Operand::kA, Operand::kB>(c, shared_address(shared),
                                         (x.num_columns + Tile::kK - 1) / Tile::kK, thread,
                                         operand_loader<Tile, Operand::kA>(x, m0, thread),
                                         operand_loader<Tile, Operand::kB>(weight, n0, thread));
    store<Tile>(
        c, reinterpret_cast<float*>(shared), thread,
        [&](int row, int column, float (&values)[8]) { epilogue(m0 + row, n0 + column, values); });
}

template <class Tile, class View, class T>
__global__ void __launch_bounds__(Tile::kThreads)
    patch_embed_dx_kernel(const __grid_constant__ MatrixView<const T> dy,
                          const __grid_constant__ MatrixView<const T> weight,
                          const __grid_constant__ View dx, float scale) {
    extern __shared__ __align__(128) char shared[];
    const int thread = threadIdx.x, tiles_n = (dx.num_columns + Tile::kN - 1) / Tile::kN;
    const int m0 = blockIdx.x / tiles_n * Tile::kM, n0 = blockIdx.x % tiles_n * Tile::kN;
    typename Tile::Accumulators c = {};
    gemm<Tile, Operand::kA, Operand::kBTransposed>(
        c, shared_address(shared), (dy.num_columns + Tile::kK - 1) / Tile::kK, thread,
        operand_loader<Tile, Operand::kA>(dy, m0, thread),
        operand_loader<Tile, Operand::kBTransposed>(weight, n0, thread));
    store<Tile>(c, reinterpret_cast<float*>(shared), thread,
                [&](int row, int column, float (&values)[8]) {
#pragma unroll
                    for (float& value : values) value *= scale;
                    store_values(dx, m0 + row, n0 + column, values);
                });
}

// Where dweight and dbias go: to their own memory, or as fp32 to this split's part of the
// workspace.
template <class T>
struct PatchEmbedDweightEpilogue {
    MatrixView<T> dweight;
    T* dbias;
    bool sums;         // dbias is wanted
    float* workspace;  // null: one split

    __device__ void operator()(int split, int row, int column, const float (&values)[8]) const {
        if (!workspace) return store_values(dweight, row, column, values);
        if (row >= dweight.num_rows) return;
        float* to = part(split, row) + column;
#pragma unroll
        for (int i = 0; i < 8; ++i)
            if (column + i < dweight.num_columns) to[i] = values[i];
    }
    __device__ void bias(int split, int row, float value) const {
        if (row >= dweight.num_rows) return;
        if (workspace)
            part(split, row)[dweight.num_columns] = value;
        else
            dbias[row] = T(value);
    }
    __device__ float* part(int64_t split, int row) const {
        const int width = dweight.num_columns + sums;
        return workspace + (split * dweight.num_rows + row) * width;
    }
};

template <class Tile, class View, class T>
__global__ void __launch_bounds__(Tile::kThreads)
    patch_embed_dweight_kernel(const __grid_constant__ MatrixView<const T> dy,
                               const __grid_constant__ View x, int steps_per_split,
                               const __grid_constant__ PatchEmbedDweightEpilogue<T> epilogue) {
    extern __shared__ __align__(128) char shared[];
    constexpr uint32_t kOnes = std::is_same_v<T, __half> ? 0x3c003c00 : 0x3f803f80;
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const int tiles_n = (x.num_columns + Tile::kN - 1) / Tile::kN;
    const int m0 = blockIdx.x / tiles_n * Tile::kM, n0 = blockIdx.x % tiles_n * Tile::kN;
    const int split = blockIdx.y, first = split * steps_per_split;
    const int num_steps = min(steps_per_split, (dy.num_rows + Tile::kK - 1) / Tile::kK - first);
    const bool sums = epilogue.sums && n0 == 0 && warp % Tile::kWarpsN == 0;
    typename Tile::Accumulators c = {};
    float row_sums[Tile::kWarpM / 16][4] =
        {};  // dy^T times a matrix of ones: its columns are equal
    gemm<Tile, Operand::kATransposed, Operand::kBTransposed>(
        c, shared_address(shared), num_steps, thread,
        operand_loader<Tile, Operand::kATransposed>(dy, m0, thread, first),
        operand_loader<Tile, Operand::kBTransposed>(x, n0, thread, first),
        [&](int i, const uint32_t (&a)[4]) {
            if (sums) mma(row_sums[i], a, kOnes, kOnes, T());
        });
    store<Tile>(c, reinterpret_cast<float*>(shared), thread,
                [&](int row, int column, float (&values)[8]) {
                    epilogue(split, m0 + row, n0 + column, values);
                });
    if (!sums || lane % 4) return;
#pragma unroll
    for (int i = 0; i < Tile::kWarpM / 16; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half)
            epilogue.bias(split,
                          m0 + warp / Tile::kWarpsN * Tile::kWarpM + i * 16 + half * 8 + lane / 4,
                          row_sums[i][half * 2]);
}

// Adds the splits in order: the result does not depend on which CTA was first.
template <class T>
__global__ void __launch_bounds__(256)
    patch_embed_sum_splits_kernel(const float* workspace, T* dweight, T* dbias, int num_splits,
                                  int64_t hidden_dim, int patch_dim) {
    const int width = patch_dim + (dbias != nullptr);
    const int64_t size = hidden_dim * width;
    for (int64_t i = thread_index(); i < size; i += thread_count()) {
        float sum = 0;
        for (int split = 0; split < num_splits; ++split) sum += workspace[split * size + i];
        const int64_t row = i / width, column = i % width;
        if (column < patch_dim)
            dweight[row * patch_dim + column] = T(sum);
        else
            dbias[row] = T(sum);
    }
}

}  // namespace vlmkernels
