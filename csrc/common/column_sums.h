// The second stage of a gradient that many CTAs or threads share: sums over the rows of up to two
// matrices of partial sums, in order, so that the same input gives the same bits.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace vlmkernels {

struct ColumnSums {
    const float* partials[2];  // [num_partials, num_columns]
    void* sums[2];             // [num_columns]; null: not wanted
    int num_partials, num_columns;
    DType dtype;  // of sums
};

}  // namespace vlmkernels
