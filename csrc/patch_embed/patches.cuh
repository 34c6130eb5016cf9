// An image or a video as the matrix of its patches, a view for common/gemm.cuh. Because the patches
// do not overlap, the place of element (patch, column) is a sum of a row's and a column's offset.
#pragma once

#include "common/fast_divide.h"
#include "common/gemm.cuh"
#include "patch_embed/patch_embed.h"

namespace vlmkernels {

template <class Element>
struct PatchView {
    using T = Element;
    static constexpr bool kAffine = false;
    T* data;
    FastDivide grid_w, grid_h, grid_t;
    FastDivide patch_w, patch_h, patch_t;
    int64_t step_image, step_t, step_h;  // from one patch to the next, in elements
    int step_w;
    int stride_channel, stride_t, stride_h;  // from one pixel to the next
    int num_rows, num_columns;
    int run_bytes;

    PatchView(T* data, const Patches& p)
        : data(data),
          grid_w(p.grid_w),
          grid_h(p.grid_h),
          grid_t(p.grid_t),
          patch_w(p.patch_w),
          patch_h(p.patch_h),
          patch_t(p.patch_t),
          step_image(p.stride_image),
          step_t(p.stride_t * p.patch_t),
          step_h(p.stride_h * p.patch_h),
          step_w(p.patch_w),
          stride_channel(int(p.stride_channel)),
          stride_t(int(p.stride_t)),
          stride_h(int(p.stride_h)),
          num_rows(int(p.num_patches)),
          num_columns(p.patch_dim),
          run_bytes(MatrixView<T>::common_alignment(
              data, {p.stride_image, p.stride_channel, p.stride_t, p.stride_h, p.patch_w})) {}

    __device__ int64_t row(uint32_t patch) const {
        uint32_t h = grid_w(patch);  // patch is now the column in the grid
        uint32_t t = grid_h(h);
        const uint32_t image = grid_t(t);
        return image * step_image + t * step_t + h * step_h + patch * step_w;
    }
    __device__ int column(uint32_t column) const {
        uint32_t h = patch_w(column);  // column is now the one in the line
        uint32_t t = patch_h(h);
        const uint32_t channel = patch_t(t);
        return channel * stride_channel + t * stride_t + h * stride_h + column;
    }
};

// Stores 8 values of a row that begin at `column`, in runs of kRunBytes.
template <int kRunBytes, class View>
__device__ void store_runs(const View& view, int row, int column, const uint4& values) {
    using T = typename View::T;
    using Run = std::conditional_t<
        kRunBytes == 16, uint4,
        std::conditional_t<kRunBytes == 8, uint2,
                           std::conditional_t<kRunBytes == 4, uint32_t, uint16_t>>>;
    constexpr int kElements = kRunBytes / 2;
    const auto to = view.row(row);
#pragma unroll
    for (int i = 0; i < 8 / kElements; ++i)
        if (column + i * kElements < view.num_columns)
            *reinterpret_cast<Run*>(view.data + (to + view.column(column + i * kElements))) =
                reinterpret_cast<const Run*>(&values)[i];
}

// Rounds 8 values and stores them at (row, column..) of a view; what lies outside is not written.
template <class View>
__device__ void store_values(const View& view, int row, int column, const float (&values)[8]) {
    using T = typename View::T;
    if (row >= view.num_rows || column >= view.num_columns) return;
    uint4 packed = {pack<T>(values[0], values[1]), pack<T>(values[2], values[3]),
                    pack<T>(values[4], values[5]), pack<T>(values[6], values[7])};
    switch (view.run_bytes) {
        case 16: return store_runs<16>(view, row, column, packed);
        case 8: return store_runs<8>(view, row, column, packed);
        case 4: return store_runs<4>(view, row, column, packed);
        default: return store_runs<2>(view, row, column, packed);
    }
}

// Adds 8 elements at (row, column..) of a matrix to values, 0 for those outside.
template <class T>
__device__ void add_values(const MatrixView<T>& view, int row, int column, float (&values)[8]) {
    if (row >= view.num_rows) return;
    const T* from = view.data + view.row(row) + column;
    if (view.run_bytes == 16 && column < view.num_columns) {
        const uint4 packed = *reinterpret_cast<const uint4*>(from);
#pragma unroll
        for (int i = 0; i < 8; ++i) values[i] += float(reinterpret_cast<const T*>(&packed)[i]);
    } else {
#pragma unroll
        for (int i = 0; i < 8; ++i)
            if (column + i < view.num_columns) values[i] += float(from[i]);
    }
}

}  // namespace vlmkernels
