// Writes what a warp has summed up: in the element type, or in float32 as a part of a larger sum.
#pragma once

#include "common/mma.cuh"

namespace vlmkernels {

// store_accumulators in float32. Four lanes write 32 bytes of a row.
template <int kM, int kN>
__device__ void store_floats(const float (&c)[kM][kN][4], const float (&factor)[kM][2], int lane,
                             int row0, int chunk0, float* out, int64_t row_stride, int num_rows,
                             int num_cols) {
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = row0 + m * 16 + half * 8 + lane / 4;
            if (row >= num_rows) continue;
#pragma unroll
            for (int n = 0; n < kN; ++n) {
                const int col = (chunk0 + n) * 8 + lane % 4 * 2;
                if ((chunk0 + n) * 8 < num_cols)
                    *reinterpret_cast<float2*>(out + row * row_stride + col) =
                        make_float2(c[m][n][half * 2] * factor[m][half],
                                    c[m][n][half * 2 + 1] * factor[m][half]);
            }
        }
}

// One of the two; rows.operator()<T>() is where row 0 begins.
template <class T, int kCols, int kM, int kN, class Rows>
__device__ void store_rows(bool float32, const float (&c)[kM][kN][4], const float (&factor)[kM][2],
                           int lane, unsigned char* tile, int row0, int chunk0, Rows&& rows,
                           int64_t row_stride, int num_rows, int num_cols) {
    if (float32)
        store_floats(c, factor, lane, row0, chunk0, rows.template operator()<float>(), row_stride,
                     num_rows, num_cols);
    else
        store_accumulators<T, kCols>(c, factor, lane, tile, row0, chunk0,
                                     rows.template operator()<T>(), row_stride, num_rows, num_cols);
}

}  // namespace vlmkernels
