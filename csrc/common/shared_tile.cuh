// Operand tiles of wgmma in shared memory, as TMA writes and wgmma reads them.
#pragma once

#include <cstdint>

#include "common/tensor_map.h"

namespace vlmkernels {

// kRows x kColumns 16-bit elements, in panels one after the other: a panel is all rows of as many
// columns as the swizzle spans (64, 32 or 16; the most that divides kColumns) and what one TMA box
// brings. Starts on a multiple of kAlignment. A K-major operand has k as its columns, an MN-major
// one as its rows.
template <int rows, int columns>
struct SharedTile {
    static constexpr int kRows = rows, kColumns = columns;
    static constexpr Swizzle kSwizzle = columns % 64 == 0   ? Swizzle::k128
                                        : columns % 32 == 0 ? Swizzle::k64
                                                            : Swizzle::k32;
    static constexpr int kSpan = int(kSwizzle);  // bytes of a row of a panel
    static constexpr int kPanelColumns = kSpan / 2, kPanels = columns / kPanelColumns;
    static constexpr int kPanelBytes = rows * kSpan, kBytes = rows * columns * 2;
    static constexpr int kAlignment = 8 * kSpan;  // where the swizzle repeats
    static_assert(columns % 16 == 0 && rows % 8 == 0);

    // Of 8 elements: row, column / 8.
    __device__ static constexpr uint32_t offset(int row, int chunk) {
        constexpr int kChunks = kSpan / 16;
        return chunk / kChunks * kPanelBytes + row * kSpan +
               (chunk % kChunks ^ row / (8 / kChunks) % kChunks) * 16;
    }
    // Rows from row (a multiple of 8), k from k (of 16) on; k16 steps on: + k_step(i).
    __device__ static uint64_t k_major(uint32_t tile, int row = 0) {
        return descriptor(tile + row * kSpan, 16, 8 * kSpan);
    }
    __device__ static constexpr uint64_t k_step(int i) {
        return (i * 16 / kPanelColumns * kPanelBytes + i * 16 % kPanelColumns * 2) / 16;
    }
    // Columns from panel on; 16 rows of k further: + mn_step(i). An operand must end with a panel.
    __device__ static uint64_t mn_major(uint32_t tile, int panel = 0) {
        return descriptor(tile + panel * kPanelBytes, kPanelBytes, 8 * kSpan);
    }
    __device__ static constexpr uint64_t mn_step(int i) { return i * 16 * kSpan / 16; }

  private:
    __device__ static uint64_t descriptor(uint32_t address, uint64_t leading, uint64_t stride) {
        constexpr uint64_t kLayout = kSpan == 128 ? 1 : kSpan == 64 ? 2 : 3;
        return (address & 0x3ffff) >> 4 | leading / 16 << 16 | stride / 16 << 32 | kLayout << 62;
    }
};

}  // namespace vlmkernels
