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
template <int kRows, int kCols, int kThreads, class T>
__device__ void load_tile(uint32_t tile, const T* source, int64_t row_stride, int num_rows,
                          int num_cols, int thread) {
    using Layout = TileLayout<kCols>;
    constexpr int kTotal = kRows * Layout::kChunks;
#pragma unroll
    for (int i = 0; i < (kTotal + kThreads - 1) / kThreads; ++i) {
        const int index = thread + i * kThreads;
        const int row = index / Layout::kChunks, chunk = index % Layout::kChunks;
        if (kTotal % kThreads && index >= kTotal) break;
        const bool valid = row < num_rows && chunk * 8 < num_cols;
        cp_async(tile + Layout::offset(row, chunk),
                 source + (valid ? row * row_stride + chunk * 8 : 0), valid);
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

}  // namespace vlmkernels
