// Small matrix products of the CPU kernels: C = [C +] A B with B and C in rows of whole vectors and
// every element of A broadcast, so that A may be read row by row or column by column, at any
// stride.
#pragma once

#include "common/simd.h"

namespace vlmkernels {
namespace {

// A tile of C is kTileRows x (up to) kTileCols vectors and stays in registers.
constexpr int kTileRows = kWidth == 16 ? 8 : 4;
constexpr int kTileCols = 3;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// What becomes of the product: C is it, C grows by it, or C is scaled by column before it does. The
// product is summed up by itself first: that rounds less than adding its terms to a large C.
struct Assign {
    VLMKERNELS_INLINE Vec operator()(Vec product, const float*, int) const { return product; }
};
struct Add {
    VLMKERNELS_INLINE Vec operator()(Vec product, const float* c, int) const {
        return load(c) + product;
    }
};
struct ScaleAndAdd {
    const float* scale;  // one for each column of C
    VLMKERNELS_INLINE Vec operator()(Vec product, const float* c, int col) const {
        return load(c) * load(scale + col * kWidth) + product;
    }
};

// kByColumn: A's element (row, k) is a[k * lda + row], otherwise a[row * lda + k].
template <int kCols, bool kByColumn, class Finish>
VLMKERNELS_INLINE void multiply_tile(const float* a, int64_t lda, const float* b, int64_t ldb,
                                     float* c, int64_t ldc, int64_t depth, Finish finish) {
    Vec sum[kTileRows][kCols];
#pragma GCC unroll 8
    for (int i = 0; i < kTileRows; ++i)
#pragma GCC unroll 8
        for (int j = 0; j < kCols; ++j) sum[i][j] = Vec{};
    for (int64_t k = 0; k < depth; ++k) {
        Vec row[kCols];
#pragma GCC unroll 8
        for (int j = 0; j < kCols; ++j) row[j] = load(b + k * ldb + j * kWidth);
#pragma GCC unroll 8
        for (int i = 0; i < kTileRows; ++i) {
            const Vec x = splat(kByColumn ? a[k * lda + i] : a[i * lda + k]);
#pragma GCC unroll 8
            for (int j = 0; j < kCols; ++j) sum[i][j] += x * row[j];
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kTileRows; ++i)
#pragma GCC unroll 8
        for (int j = 0; j < kCols; ++j) {
            float* at = c + i * ldc + j * kWidth;
            store(at, finish(sum[i][j], at, j));
        }
}

// C[rows, kCols vectors]; rows is rounded up to kTileRows, which A and C must have room for.
template <int kCols, bool kByColumn, class Finish>
void multiply_columns(const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
                      int64_t ldc, int64_t rows, int64_t depth, Finish finish) {
    for (int64_t i = 0; i < rows; i += kTileRows)
        multiply_tile<kCols, kByColumn>(a + (kByColumn ? i : i * lda), lda, b, ldb, c + i * ldc,
                                        ldc, depth, finish);
}

// C[rows, vectors * kWidth] += A[rows, depth] B[depth, vectors * kWidth].
template <bool kByColumn>
void multiply_add(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc,
                  int64_t rows, int64_t depth, int64_t vectors) {
    for (int64_t left = vectors; left > 0;) {
        const int64_t cols = ceil_div(left, ceil_div(left, kTileCols));  // 4 = 2 + 2, not 3 + 1
        auto multiply = [&]<int kCols>() {
            multiply_columns<kCols, kByColumn>(a, lda, b, ldb, c, ldc, rows, depth, Add{});
        };
        if (cols == 3) multiply.template operator()<3>();
        if (cols == 2) multiply.template operator()<2>();
        if (cols == 1) multiply.template operator()<1>();
        b += cols * kWidth;
        c += cols * kWidth;
        left -= cols;
    }
}

}  // namespace
}  // namespace vlmkernels
