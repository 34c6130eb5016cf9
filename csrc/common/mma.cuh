// Tensor-core tiles for sm_80 and later: swizzled shared memory, and the fragments of m16n8k16.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/ptx.cuh"

namespace vlmkernels {

// A tile of rows of kCols 16-bit elements in shared memory. A row is a sequence of 16-byte chunks,
// permuted within groups of kGroup such that the 8 rows that one ldmatrix phase reads lie in 8
// different bank groups. The permutation repeats every 8 rows.
template <int kCols>
struct TileLayout {
    static_assert(kCols % 16 == 0);
    static constexpr int kChunks = kCols / 8;
    static constexpr int kGroup = kChunks % 8 == 0 ? 8 : kChunks % 4 == 0 ? 4 : 2;
    static constexpr int kRowBytes = kCols * 2;

    __device__ static uint32_t swizzle(int row) { return row / (8 / kGroup) % kGroup; }
    __device__ static uint32_t offset(int row, int chunk) {
        return row * kRowBytes + (chunk ^ swizzle(row)) * 16;
    }
};

// Starts copying rows [0, kRows) x columns [0, kCols) of a row-major matrix into a tile. Rows from
// num_rows and columns from num_cols (a multiple of 8) on are not read: they become zero.
// A thread stays in one column of chunks; where kThreads is no multiple of kChunks some idle.
template <int kRows, int kCols, int kThreads, class T>
__device__ void load_tile(uint32_t tile, const T* source, int64_t row_stride, int num_rows,
                          int num_cols, int thread) {
    using Layout = TileLayout<kCols>;
    constexpr int kRowsAtOnce = kThreads / Layout::kChunks;
    static_assert(kRowsAtOnce > 0);
    const int chunk = thread % Layout::kChunks, first_row = thread / Layout::kChunks;
    if (kThreads % Layout::kChunks && first_row >= kRowsAtOnce) return;
    if (chunk * 8 >= num_cols) num_rows = 0;
    source += first_row * row_stride + chunk * 8;
#pragma unroll
    for (int row0 = 0; row0 < kRows; row0 += kRowsAtOnce) {
        const int row = row0 + first_row;
        if (kRows % kRowsAtOnce && row >= kRows) break;
        cp_async(tile + Layout::offset(row, chunk), source, row < num_rows);
        source += kRowsAtOnce * row_stride;
    }
}

// What a fragment of 16x16 elements is to the product a b of m16n8k16.
enum class Operand {
    kA,            // tile is m x k: the four registers of a
    kATransposed,  // tile is k x m: as kA
    kB,            // tile is n x k: b of n tiles 0 (registers 0, 1) and 1 (registers 2, 3)
    kBTransposed   // tile is k x n: as kB
};

// Loads 16x16 fragments of a tile; holds what depends on the lane only.
template <int kCols, Operand kOperand>
struct FragmentLoader {
    using Layout = TileLayout<kCols>;
    uint32_t row_offset, chunk_offset;

    __device__ explicit FragmentLoader(int lane) {
        const bool chunk_by_8 = kOperand == Operand::kB || kOperand == Operand::kATransposed;
        const int row = lane % 8 + (lane / (chunk_by_8 ? 16 : 8) % 2) * 8;
        const int chunk = lane / (chunk_by_8 ? 8 : 16) % 2;
        row_offset = row * Layout::kRowBytes;
        chunk_offset = (chunk ^ Layout::swizzle(row)) * 16;
    }
    // The fragment at rows row0.. (a multiple of 8) and chunks chunk0.. (even) of the tile.
    __device__ void operator()(uint32_t (&fragment)[4], uint32_t tile, int row0, int chunk0) const {
        constexpr int kGroup = Layout::kGroup;
        const uint32_t address = tile + row_offset + (chunk_offset ^ chunk0 % kGroup * 16) +
                                 (row0 * Layout::kRowBytes + chunk0 / kGroup * kGroup * 16);
        if constexpr (kOperand == Operand::kBTransposed || kOperand == Operand::kATransposed)
            ldmatrix_transposed(fragment, address);
        else
            ldmatrix(fragment, address);
    }
};

// Two floats as a pair of 16-bit elements, lo in the low half: how accumulators become a fragment.
template <class T>
__device__ uint32_t pack(float lo, float hi) {
    if constexpr (std::is_same_v<T, __half>) {
        __half2 pair = __floats2half2_rn(lo, hi);
        return reinterpret_cast<const uint32_t&>(pair);
    } else {
        __nv_bfloat162 pair = __floats2bfloat162_rn(lo, hi);
        return reinterpret_cast<const uint32_t&>(pair);
    }
}

// The accumulators of two neighbouring 16x8 tiles as operand a of the next product.
template <class T>
__device__ void pack_a(uint32_t (&a)[4], const float (&left)[4], const float (&right)[4]) {
    a[0] = pack<T>(left[0], left[1]);
    a[1] = pack<T>(left[2], left[3]);
    a[2] = pack<T>(right[0], right[1]);
    a[3] = pack<T>(right[2], right[3]);
}

// c = a b^T for rows row_a.. of tile a (16 kM) and rows row_b.. of tile b (8 kN), over all columns.
template <class T, int kM, int kN, int kCols>
__device__ void multiply_rows(float (&c)[kM][kN][4], int lane, uint32_t a, int row_a, uint32_t b,
                              int row_b) {
    static_assert(kN % 2 == 0);
    const FragmentLoader<kCols, Operand::kA> load_a(lane);
    const FragmentLoader<kCols, Operand::kB> load_b(lane);
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int n = 0; n < kN; ++n) c[m][n][0] = c[m][n][1] = c[m][n][2] = c[m][n][3] = 0;
    // Fragments are loaded one step ahead of their use.
    constexpr int kStepsK = kCols / 16, kStepsN = kN / 2;
    uint32_t a_fragment[2][kM][4], b_fragment[2][4];
    auto load = [&](int k, int n) {
        if (n == 0)
#pragma unroll
            for (int m = 0; m < kM; ++m) load_a(a_fragment[k % 2][m], a, row_a + m * 16, k * 2);
        load_b(b_fragment[(k * kStepsN + n) % 2], b, row_b + n * 16, k * 2);
    };
    load(0, 0);
#pragma unroll
    for (int k = 0; k < kStepsK; ++k)
#pragma unroll
        for (int n = 0; n < kStepsN; ++n) {
            if (n + 1 < kStepsN)
                load(k, n + 1);
            else if (k + 1 < kStepsK)
                load(k + 1, 0);
            const uint32_t (&b_now)[4] = b_fragment[(k * kStepsN + n) % 2];
#pragma unroll
            for (int m = 0; m < kM; ++m) {
                mma(c[m][n * 2], a_fragment[k % 2][m], b_now[0], b_now[1], T());
                mma(c[m][n * 2 + 1], a_fragment[k % 2][m], b_now[2], b_now[3], T());
            }
        }
}

// c += p b for p in accumulators (16 kM x 8 kK), rounded to T, and rows row_b.. of tile b, its
// columns from chunk0 on (8 kN).
template <class T, int kCols, int kM, int kK, int kN>
__device__ void multiply_accumulators(float (&c)[kM][kN][4], const float (&p)[kM][kK][4], int lane,
                                      uint32_t b, int row_b, int chunk0 = 0) {
    static_assert(kN % 2 == 0 && kK % 2 == 0);
    const FragmentLoader<kCols, Operand::kBTransposed> load_b(lane);
    constexpr int kStepsK = kK / 2, kStepsN = kN / 2;
    uint32_t a_fragment[kM][4], b_fragment[2][4];
    auto load = [&](int k, int n) {
        load_b(b_fragment[(k * kStepsN + n) % 2], b, row_b + k * 16, chunk0 + n * 2);
    };
    load(0, 0);
#pragma unroll
    for (int k = 0; k < kStepsK; ++k) {
#pragma unroll
        for (int m = 0; m < kM; ++m) pack_a<T>(a_fragment[m], p[m][k * 2], p[m][k * 2 + 1]);
#pragma unroll
        for (int n = 0; n < kStepsN; ++n) {
            if (n + 1 < kStepsN)
                load(k, n + 1);
            else if (k + 1 < kStepsK)
                load(k + 1, 0);
            const uint32_t (&b_now)[4] = b_fragment[(k * kStepsN + n) % 2];
#pragma unroll
            for (int m = 0; m < kM; ++m) {
                mma(c[m][n * 2], a_fragment[m], b_now[0], b_now[1], T());
                mma(c[m][n * 2 + 1], a_fragment[m], b_now[2], b_now[3], T());
            }
        }
    }
}

// Writes accumulators (16 kM x 8 kN), times a factor per row, to rows row0.. and columns from
// chunk0 on of a row-major matrix: through the warp's own part of a tile, so that the stores are 16
// bytes wide. Rows from num_rows and columns from num_cols on are not written.
template <class T, int kCols, int kM, int kN>
__device__ void store_accumulators(const float (&c)[kM][kN][4], const float (&factor)[kM][2],
                                   int lane, unsigned char* tile, int row0, int chunk0, T* out,
                                   int64_t row_stride, int num_rows, int num_cols) {
    using Layout = TileLayout<kCols>;
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int n = 0; n < kN; ++n)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int row = row0 + m * 16 + half * 8 + lane / 4;
                const float scale = factor[m][half];
                *reinterpret_cast<uint32_t*>(tile + Layout::offset(row, chunk0 + n) +
                                             lane % 4 * 4) =
                    pack<T>(c[m][n][half * 2] * scale, c[m][n][half * 2 + 1] * scale);
            }
    __syncwarp();
#pragma unroll 4
    for (int index = lane; index < kM * 16 * kN; index += 32) {
        const int row = row0 + index / kN, chunk = chunk0 + index % kN;
        if (row < num_rows && chunk * 8 < num_cols)
            *reinterpret_cast<uint4*>(out + row * row_stride + chunk * 8) =
                *reinterpret_cast<const uint4*>(tile + Layout::offset(row, chunk));
    }
}

}  // namespace vlmkernels
