// Backward: the three matrix products with x, per image. PyTorch has multiplied q' and dy before
// and takes dq and the gradients of the weights from y and dq' after, as products over all images.
//   probabilities  scores = q' x^T and dp = dy x^T side by side, then p and ds
//   rows           [y; dq'] = [p; ds] x
//   dx             = [p; ds]^T [dy; q']
// Tokens from an image's key_length on are not read, and have dx = 0.
#pragma once

#include <cuda_runtime.h>

#include "common/fast_divide.h"
#include "common/gemm.cuh"
#include "common/launch.cuh"
#include "common/softmax.cuh"
#include "common/vector.cuh"
#include "qformer_attention/qformer_attention.h"

namespace vlmkernels {

// One image's rows of the two stacks, one stack after the other or (interleaved) in turn, 16 rows
// of the second and 16 of the first: then a warp that has scores also has their dp.
template <class Element>
struct StackView {
    using T = Element;
    static constexpr bool kAffine = false;
    T* data;
    FastDivide num_queries;
    int64_t head_stride, stack_stride;
    int stack_rows, width, num_rows, num_columns, run_bytes;
    bool interleaved;

    StackView(T* data, const QFormerAttentionBackwardParams& p, bool interleaved)
        : data(data),
          num_queries(p.num_queries),
          head_stride(int64_t(p.batch) * p.num_queries * p.width),
          stack_stride(head_stride * p.num_heads),
          stack_rows(p.num_heads * p.num_queries),
          width(p.width),
          num_rows(2 * (interleaved ? (stack_rows + 15) / 16 * 16 : stack_rows)),
          num_columns(p.width),
          run_bytes(16),
          interleaved(interleaved) {}
    __device__ int64_t row(int row) const {
        int stack = row >= stack_rows;
        uint32_t query = row - stack * stack_rows;
        if (interleaved) {
            stack = row / 16 % 2 == 0;
            query = min(row / 32 * 16 + row % 16, stack_rows - 1);
        }
        const uint32_t head = num_queries(query);
        return stack * stack_stride + head * head_stride + int64_t(query) * width;
    }
    __device__ int column(int column) const { return column; }
};

// The image that a CTA works on, and its share of everything.
template <class Element>
struct QFormerImage {
    int image, num_keys, num_rows;

    __device__ explicit QFormerImage(const QFormerAttentionBackwardParams& p)
        : image(blockIdx.y),
          num_keys(p.key_lengths ? max(0, min(p.key_lengths[blockIdx.y], p.num_tokens))
                                 : p.num_tokens),
          num_rows(p.num_heads * p.num_queries) {}
    __device__ StackView<Element> stacks(StackView<Element> view,
                                         const QFormerAttentionBackwardParams& p) const {
        view.data += int64_t(image) * p.num_queries * p.width;
        return view;
    }
    __device__ MatrixView<const Element> tokens(MatrixView<const Element> x,
                                                const QFormerAttentionBackwardParams& p) const {
        x.data += image * p.x_batch_stride;
        x.num_rows = num_keys;
        return x;
    }
    __device__ int64_t probabilities(const QFormerAttentionBackwardParams& p) const {
        return int64_t(image) * 2 * num_rows * p.num_columns;
    }
};

// c holds scores in even and dp in odd tiles of 16 rows.
template <class Tile>
__device__ void store_probabilities(const QFormerAttentionBackwardParams& p,
                                    const typename Tile::Accumulators& c, int m0, int n0,
                                    int thread) {
    using T = typename Tile::T;
    const QFormerImage<const T> image(p);
    const int lane = thread % 32, warp = thread / 32;
    m0 += warp / Tile::kWarpsN * Tile::kWarpM;
    n0 += warp % Tile::kWarpsN * Tile::kWarpN + lane % 4 * 2;
    T* out = static_cast<T*>(p.probabilities) + image.probabilities(p);
#pragma unroll
    for (int i = 0; i < Tile::kWarpM / 16; i += 2)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = m0 / 2 + i * 8 + half * 8 + lane / 4;
            if (row >= image.num_rows) continue;
            const int64_t index = int64_t(image.image) * image.num_rows + row;
            const float lse = p.lse[index] * kLog2e, delta = p.delta[index];
#pragma unroll
            for (int j = 0; j < Tile::kWarpN / 8; ++j) {
                const int column = n0 + j * 8;
                if (column >= p.num_columns) continue;
                float probability[2], ds[2];
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const bool exists = column + e < image.num_keys;
                    const float score = c[i][j][half * 2 + e] * (p.softmax_scale * kLog2e);
                    probability[e] = exists ? exp2_approx(score - lse) : 0;
                    const float dp = c[i + 1][j][half * 2 + e];
                    ds[e] = exists ? probability[e] * (dp - delta) * p.softmax_scale : 0;
                }
                T* at = out + int64_t(row) * p.num_columns + column;
                *reinterpret_cast<uint32_t*>(at) = pack<T>(probability[0], probability[1]);
                *reinterpret_cast<uint32_t*>(at + int64_t(image.num_rows) * p.num_columns) =
                    pack<T>(ds[0], ds[1]);
            }
        }
}

template <class Tile, class T>
__global__ void __launch_bounds__(Tile::kThreads)
    qformer_attention_probabilities_kernel(const __grid_constant__ QFormerAttentionBackwardParams p,
                                           const __grid_constant__ StackView<const T> stacks,
                                           const __grid_constant__ MatrixView<const T> tokens) {
    extern __shared__ __align__(128) char shared[];
    const QFormerImage<const T> image(p);
    const int thread = threadIdx.x, tiles_n = (p.num_columns + Tile::kN - 1) / Tile::kN;
    const int m0 = blockIdx.x / tiles_n * Tile::kM, n0 = blockIdx.x % tiles_n * Tile::kN;
    const auto rows = image.stacks(stacks, p);
    const auto x = image.tokens(tokens, p);
    typename Tile::Accumulators c = {};
    if (n0 < image.num_keys)
        gemm<Tile, Operand::kA, Operand::kB>(c, shared_address(shared),
                                             (p.width + Tile::kK - 1) / Tile::kK, thread,
                                             operand_loader<Tile, Operand::kA>(rows, m0, thread),
                                             operand_loader<Tile, Operand::kB>(x, n0, thread));
    store_probabilities<Tile>(p, c, m0, n0, thread);
}

template <class Tile, class T>
__global__ void __launch_bounds__(Tile::kThreads)
    qformer_attention_rows_kernel(const __grid_constant__ QFormerAttentionBackwardParams p,
                                  const __grid_constant__ StackView<const T> stacks,
                                  const __grid_constant__ MatrixView<const T> tokens,
                                  const __grid_constant__ MatrixView<const T> probabilities) {
    extern __shared__ __align__(128) char shared[];
    const QFormerImage<const T> image(p);
    const int thread = threadIdx.x, tiles_n = (p.width + Tile::kN - 1) / Tile::kN;
    const int m0 = blockIdx.x / tiles_n * Tile::kM, n0 = blockIdx.x % tiles_n * Tile::kN;
    const auto x = image.tokens(tokens, p);
    auto a = probabilities;
    a.data += image.probabilities(p);
    typename Tile::Accumulators c = {};
    gemm<Tile, Operand::kA, Operand::kBTransposed>(
        c, shared_address(shared), (image.num_keys + Tile::kK - 1) / Tile::kK, thread,
        operand_loader<Tile, Operand::kA>(a, m0, thread),
        operand_loader<Tile, Operand::kBTransposed>(x, n0, thread));
    const auto rows = image.stacks(stacks, p);
    T* out = static_cast<T*>(p.drows) + int64_t(image.image) * p.num_queries * p.width;
    store<Tile>(c, reinterpret_cast<float*>(shared), thread,
                [&](int row, int column, float (&values)[8]) {
                    row += m0, column += n0;
                    if (row < rows.num_rows && column < p.width)
                        store(out + rows.row(row) + column, values);
                });
}

template <class Tile, class T>
__global__ void __launch_bounds__(Tile::kThreads)
    qformer_attention_dx_kernel(const __grid_constant__ QFormerAttentionBackwardParams p,
                                const __grid_constant__ StackView<const T> stacks,
                                const __grid_constant__ MatrixView<const T> probabilities) {
    extern __shared__ __align__(128) char shared[];
    const QFormerImage<const T> image(p);
    const int thread = threadIdx.x, tiles_n = (p.width + Tile::kN - 1) / Tile::kN;
    const int m0 = blockIdx.x / tiles_n * Tile::kM, n0 = blockIdx.x % tiles_n * Tile::kN;
    const auto rows = image.stacks(stacks, p);
    auto a = probabilities;
    a.data += image.probabilities(p);
    typename Tile::Accumulators c = {};
    if (m0 < image.num_keys)
        gemm<Tile, Operand::kATransposed, Operand::kBTransposed>(
            c, shared_address(shared), (rows.num_rows + Tile::kK - 1) / Tile::kK, thread,
            operand_loader<Tile, Operand::kATransposed>(a, m0, thread),
            operand_loader<Tile, Operand::kBTransposed>(rows, n0, thread));
    T* out = static_cast<T*>(p.dx) + int64_t(image.image) * p.num_tokens * p.width;
    store<Tile>(c, reinterpret_cast<float*>(shared), thread,
                [&](int row, int column, float (&values)[8]) {
                    row += m0, column += n0;
                    if (row < p.num_tokens && column < p.width)
                        store(out + int64_t(row) * p.width + column, values);
                });
}

// f.template operator()<Tile>(tiles of an m x n result), small tiles where large ones would leave
// much of a GPU idle.
template <class T, class F>
Error with_tile(int64_t m, int64_t n, int64_t batch, F&& f) {
    using Large = GemmTile<T, 128, 128, 32, 2, 2, 4>;
    using Small = GemmTile<T, 64, 64, 32, 2, 2, 4>;
    auto tiles = [&](int size) { return (m + size - 1) / size * ((n + size - 1) / size); };
    if (tiles(128) * batch >= 100) return f.template operator()<Large>(tiles(128));
    return f.template operator()<Small>(tiles(64));
}

template <class T>
Error launch(const QFormerAttentionBackwardParams& p, Stream stream) {
    const int rows = p.num_heads * p.num_queries;
    const auto* operands = static_cast<const T*>(p.rows);
    const StackView<const T> in_turn(operands, p, true), stacks(operands, p, false);
    const MatrixView<const T> x(static_cast<const T*>(p.x), p.x_token_stride, p.num_tokens,
                                p.width);
    const MatrixView<const T> probabilities(static_cast<const T*>(p.probabilities), p.num_columns,
                                            2 * rows, p.num_columns);
    Error error =
        with_tile<T>(in_turn.num_rows, p.num_columns, p.batch, [&]<class Tile>(int64_t tiles) {
            return launch(qformer_attention_probabilities_kernel<Tile, T>, Grid(tiles, p.batch),
                          Tile::kThreads, Tile::kSharedBytes, stream, p, in_turn, x);
        });
    if (error) return error;
    error = with_tile<T>(2 * rows, p.width, p.batch, [&]<class Tile>(int64_t tiles) {
        return launch(qformer_attention_rows_kernel<Tile, T>, Grid(tiles, p.batch), Tile::kThreads,
                      Tile::kSharedBytes, stream, p, stacks, x, probabilities);
    });
    if (error || !p.dx) return error;
    return with_tile<T>(p.num_tokens, p.width, p.batch, [&]<class Tile>(int64_t tiles) {
        return launch(qformer_attention_dx_kernel<Tile, T>, Grid(tiles, p.batch), Tile::kThreads,
                      Tile::kSharedBytes, stream, p, stacks, probabilities);
    });
}

}  // namespace vlmkernels
