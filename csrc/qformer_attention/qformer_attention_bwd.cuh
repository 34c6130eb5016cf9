// Backward: the three matrix products with x, per image. PyTorch has multiplied q' and dy before
// and takes dq and the gradients of the weights from y and dq' after, as products over all images.
//   Probabilities  scores = q' x^T and dp = dy x^T side by side, then p and ds
//   Rows           [y; dq'] = [p; ds] x
//   Tokens         dx = [p; ds]^T [dy; q']
// Tokens from an image's key_length on are not read, and have dx = 0. Two kernels run any of them:
// by mma.sync here, by wgmma in qformer_attention_bwd_hopper.cuh.
#pragma once

#include <cuda_runtime.h>

#include "common/fast_divide.h"
#include "common/gemm.cuh"
#include "common/launch.cuh"
#include "common/softmax.cuh"
#include "common/vector.cuh"
#include "common/wgmma.cuh"
#include "qformer_attention/qformer_attention.h"

namespace vlmkernels {

// One image's rows of the two stacks, one stack after the other; or in turn, 2^turn rows of the
// second and as many of the first: then a warp that has scores also has their dp.
template <class Element>
struct StackView {
    using T = Element;
    static constexpr bool kAffine = false;
    T* data;
    FastDivide num_queries;
    uint32_t row_stride, head_stride, stack_stride;  // of 8 elements
    int stack_rows, turn, num_rows, num_columns, run_bytes;

    StackView(T* data, const QFormerAttentionBackwardParams& p, int turn = 0)
        : data(data),
          num_queries(p.num_queries),
          row_stride(p.width / 8),
          head_stride(row_stride * p.batch * p.num_queries),
          stack_stride(head_stride * p.num_heads),
          stack_rows(p.num_heads * p.num_queries),
          turn(turn),
          num_rows(2 * (turn ? (stack_rows + (1 << turn) - 1) >> turn << turn : stack_rows)),
          num_columns(p.width),
          run_bytes(16) {}
    __device__ int64_t row(int row) const {
        int stack = row >= stack_rows;
        uint32_t query = row - stack * stack_rows;
        if (turn) {
            stack = ~row >> turn & 1;
            query = (row >> (turn + 1) << turn) + (row & ((1 << turn) - 1));
            query = min(query, stack_rows - 1);
        }
        const uint32_t head = num_queries(query);
        return int64_t(uint32_t(stack) * stack_stride + head * head_stride + query * row_stride) *
               8;
    }
    __device__ int column(int column) const { return column; }
};

// What the products share: an image's part of each operand.
template <class T>
struct QFormerOperands {
    using Element = T;
    QFormerAttentionBackwardParams p;
    StackView<const T> stacks;
    MatrixView<const T> x, weights;

    QFormerOperands(const QFormerAttentionBackwardParams& p, int turn = 0)
        : p(p),
          stacks(static_cast<const T*>(p.rows), p, turn),
          x(static_cast<const T*>(p.x), p.x_token_stride, p.num_tokens, p.width),
          weights(static_cast<const T*>(p.probabilities), p.num_columns, 2 * num_rows(),
                  p.num_columns) {}
    __host__ __device__ int num_rows() const { return p.num_heads * p.num_queries; }
    __device__ int num_keys(int image) const {
        return p.key_lengths ? max(0, min(p.key_lengths[image], p.num_tokens)) : p.num_tokens;
    }
    __device__ auto rows_of(int image) const {
        auto view = stacks;
        view.data += int64_t(image) * p.num_queries * p.width;
        return view;
    }
    __device__ auto tokens_of(int image) const {
        auto view = x;
        view.data += image * p.x_batch_stride;
        view.num_rows = num_keys(image);
        return view;
    }
    __device__ int64_t weights_start(int image) const {
        return int64_t(image) * 2 * num_rows() * p.num_columns;
    }
    __device__ auto weights_of(int image) const {
        auto view = weights;
        view.data += weights_start(image);
        return view;
    }
};

// Each product: c (m, n) = a b over depth(image, m0, n0), stored to row_of(image, row) where that
// is not null; or given to store_pair(), the scores and the dp that a thread has of a row. kTmaA:
// of the operands TMA can bring a, otherwise b; the other one has rows of several heads, or padding
// that must not be read.
template <class T>
struct Probabilities : QFormerOperands<T> {
    using QFormerOperands<T>::p;
    static constexpr Major kMajorA = Major::kK, kMajorB = Major::kK;
    static constexpr bool kPairs = true, kTmaA = false;

    int m() const { return this->stacks.num_rows; }
    int n() const { return p.num_columns; }
    __device__ int depth(int image, int, int n0) const {
        return n0 < this->num_keys(image) ? p.width : 0;
    }
    __device__ auto a(int image) const { return this->rows_of(image); }
    __device__ auto b(int image) const { return this->tokens_of(image); }

    // Columns column + 8 j and the next; elements half * 2 and half * 2 + 1.
    template <int kN>
    __device__ void store_pair(int image, int row, int column, const float (&scores)[kN][4],
                               const float (&dp)[kN][4], int half) const {
        if (row >= this->num_rows()) return;
        const int64_t index = int64_t(image) * this->num_rows() + row;
        const float lse = p.lse[index] * kLog2e, delta = p.delta[index];
        const int num_keys = this->num_keys(image);
        T* out = static_cast<T*>(p.probabilities) + this->weights_start(image) +
                 int64_t(row) * p.num_columns;
#pragma unroll
        for (int j = 0; j < kN; ++j, column += 8) {
            if (column >= p.num_columns) break;
            float probability[2], ds[2];
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const bool exists = column + e < num_keys;
                const float score = scores[j][half * 2 + e] * (p.softmax_scale * kLog2e);
                probability[e] = exists ? exp2_approx(score - lse) : 0;
                const float change = dp[j][half * 2 + e] - delta;
                ds[e] = exists ? probability[e] * change * p.softmax_scale : 0;
            }
            *reinterpret_cast<uint32_t*>(out + column) = pack<T>(probability[0], probability[1]);
            *reinterpret_cast<uint32_t*>(out + int64_t(this->num_rows()) * p.num_columns + column) =
                pack<T>(ds[0], ds[1]);
        }
    }
};

template <class T>
struct Rows : QFormerOperands<T> {
    using QFormerOperands<T>::p;
    static constexpr Major kMajorA = Major::kK, kMajorB = Major::kMN;
    static constexpr bool kPairs = false, kTmaA = true;

    int m() const { return 2 * this->num_rows(); }
    int n() const { return p.width; }
    __device__ int depth(int image, int, int) const { return this->num_keys(image); }
    __device__ auto a(int image) const { return this->weights_of(image); }
    __device__ auto b(int image) const { return this->tokens_of(image); }
    __device__ T* row_of(int image, int row) const {
        if (row >= this->stacks.num_rows) return nullptr;
        return static_cast<T*>(p.drows) + int64_t(image) * p.num_queries * p.width +
               this->stacks.row(row);
    }
};

template <class T>
struct Tokens : QFormerOperands<T> {
    using QFormerOperands<T>::p;
    static constexpr Major kMajorA = Major::kMN, kMajorB = Major::kMN;
    static constexpr bool kPairs = false, kTmaA = true;

    int m() const { return p.num_tokens; }
    int n() const { return p.width; }
    __device__ int depth(int image, int m0, int) const {
        return m0 < this->num_keys(image) ? this->stacks.num_rows : 0;
    }
    __device__ auto a(int image) const { return this->weights_of(image); }
    __device__ auto b(int image) const { return this->rows_of(image); }
    __device__ T* row_of(int image, int row) const {
        if (row >= p.num_tokens) return nullptr;
        return static_cast<T*>(p.dx) + (int64_t(image) * p.num_tokens + row) * p.width;
    }
};

template <class Tile, class Product>
__global__ void __launch_bounds__(Tile::kThreads)
    qformer_attention_bwd_kernel(const __grid_constant__ Product product, int tiles_m,
                                 int tiles_n) {
    extern __shared__ __align__(1024) unsigned char shared[];
    constexpr Operand kA = Product::kMajorA == Major::kK ? Operand::kA : Operand::kATransposed;
    constexpr Operand kB = Product::kMajorB == Major::kK ? Operand::kB : Operand::kBTransposed;
    const int thread = threadIdx.x, row = blockIdx.x / tiles_n, image = row / tiles_m;
    const int m0 = row % tiles_m * Tile::kM, n0 = blockIdx.x % tiles_n * Tile::kN;
    const auto a = product.a(image);
    const auto b = product.b(image);
    typename Tile::Accumulators c = {};
    gemm<Tile, kA, kB>(
        c, shared_address(shared), (product.depth(image, m0, n0) + Tile::kK - 1) / Tile::kK, thread,
        operand_loader<Tile, kA>(a, m0, thread), operand_loader<Tile, kB>(b, n0, thread));
    if constexpr (Product::kPairs) {
        const int lane = thread % 32, warp = thread / 32;
        const int row0 = (m0 + warp / Tile::kWarpsN * Tile::kWarpM) / 2 + lane / 4;
        const int column = n0 + warp % Tile::kWarpsN * Tile::kWarpN + lane % 4 * 2;
#pragma unroll
        for (int i = 0; i < Tile::kWarpM / 16; i += 2)
#pragma unroll
            for (int half = 0; half < 2; ++half)
                product.store_pair(image, row0 + i * 8 + half * 8, column, c[i], c[i + 1], half);
    } else {
        store<Tile>(c, reinterpret_cast<float*>(shared), thread,
                    [&](int row, int column, const float (&values)[8]) {
                        auto* to = product.row_of(image, m0 + row);
                        if (to && n0 + column < product.p.width)
                            vlmkernels::store(to + n0 + column, values);
                    });
    }
}

template <class Tile, class Product>
Error launch_bwd(const Product& product, Stream stream) {
    const int tiles_n = (product.n() + Tile::kN - 1) / Tile::kN;
    const int tiles_m = (product.m() + Tile::kM - 1) / Tile::kM;
    return launch(qformer_attention_bwd_kernel<Tile, Product>,
                  int64_t(tiles_m) * tiles_n * product.p.batch, Tile::kThreads, Tile::kSharedBytes,
                  stream, product, tiles_m, tiles_n);
}

template <class T>
Error launch_sm80(const QFormerAttentionBackwardParams& p, Stream stream) {
    using Tile = GemmTile<T, 128, 128, 32, 2, 2, 4>;
    Error error = launch_bwd<Tile>(Probabilities<T>{{p, 4}}, stream);
    if (!error) error = launch_bwd<Tile>(Rows<T>{p}, stream);
    return error || !p.dx ? error : launch_bwd<Tile>(Tokens<T>{p}, stream);
}

}  // namespace vlmkernels
