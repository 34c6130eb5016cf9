#pragma once

#include "common/column_sums.h"
#include "common/cpu.h"

namespace vlmkernels {
namespace {

inline void column_sums(const ColumnSums& p, int which) {
    constexpr int64_t kColumns = 1024;
    if (!p.sums[which]) return;
    parallel_for((p.num_columns + kColumns - 1) / kColumns, 1, [&](int64_t first, int64_t last) {
        const int64_t end = last * kColumns < p.num_columns ? last * kColumns : p.num_columns;
        for (int64_t begin = first * kColumns; begin < end; begin += kColumns) {
            const int64_t n = end - begin < kColumns ? end - begin : kColumns;
            float sum[kColumns] = {};
            for (int partial = 0; partial < p.num_partials; ++partial) {
                const float* x = p.partials[which] + int64_t(partial) * p.num_columns + begin;
                for (int64_t i = 0; i < n; ++i) sum[i] += x[i];
            }
            dispatch_float(p.dtype, [&]<class T>() {
                for (int64_t i = 0; i < n; ++i)
                    static_cast<T*>(p.sums[which])[begin + i] = from_float<T>(sum[i]);
            });
        }
    });
}

inline void column_sums(const ColumnSums& p) {
    for (int which : {0, 1}) column_sums(p, which);
}

}  // namespace
}  // namespace vlmkernels
