// dweight of patch_embed from pixels on Hopper. Patches are read once, to rows of 16-bit elements
// in a workspace, from where TMA brings them as often as the product needs them.
#pragma once

#include "common/gemm_hopper.cuh"
#include "common/grid.cuh"
#include "patch_embed/readers.cuh"

namespace vlmkernels {

// x as rows, bytes less 128; then a column of ones, whose products are the sums of dy, and zeros up
// to num_columns. A warp takes 32 patches, of each as much as is read at once.
template <class View, class T>
__global__ void __launch_bounds__(128)
    patch_embed_pixel_rows_kernel(const __grid_constant__ View x, T* rows, int num_columns) {
    with_reader(x, [&]<class Reader>() {
        constexpr int kOfGroup = 16 / sizeof(typename View::T);  // columns
        constexpr int kColumns = Reader::kGroups * kOfGroup;
        constexpr uint32_t kOne = std::is_same_v<T, __half> ? 0x3c00 : 0x3f80;
        const int batches = (num_columns + kColumns - 1) / kColumns;
        const int64_t tasks = int64_t((x.num_rows + 31) / 32) * batches * 32;
        for (int64_t task = thread_index(); task < tasks; task += thread_count()) {
            const int patch = int(task / 32 / batches) * 32 + int(task % 32);
            if (patch >= x.num_rows) continue;
            const int first = int(task / 32 % batches) * kColumns;
            uint32_t words[Reader::kGroups * 4];
            Reader::read(words, x, x.row(patch), true, first);
            T* row = rows + int64_t(patch) * num_columns;
#pragma unroll
            for (int i = 0; i < kColumns; i += 8) {
                uint4 eight;
                if constexpr (kOfGroup == 16) {
                    from_signed_bytes(words[i / 4], eight.x, eight.y, T());
                    from_signed_bytes(words[i / 4 + 1], eight.z, eight.w, T());
                } else {
                    eight = {words[i / 2], words[i / 2 + 1], words[i / 2 + 2], words[i / 2 + 3]};
                }
                const int last = x.num_columns - first - i;
                const uint32_t one = kOne << last % 2 * 16;
                eight.x |= last / 2 == 0 && last >= 0 ? one : 0;
                eight.y |= last / 2 == 1 ? one : 0;
                eight.z |= last / 2 == 2 ? one : 0;
                eight.w |= last / 2 == 3 ? one : 0;
                if (first + i < num_columns) *reinterpret_cast<uint4*>(row + first + i) = eight;
            }
        }
    });
}

// dy^T rows in num_splits parts of the patches: [num_splits, hidden_dim, width].
template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    patch_embed_dweight_hopper_kernel(const __grid_constant__ CUtensorMap dy,
                                      const __grid_constant__ CUtensorMap rows, float* workspace,
                                      int num_patches, int hidden_dim, int width, int num_splits) {
    if constexpr (kHopperCode) {
        extern __shared__ __align__(1024) unsigned char stages[];
        const int tiles_n = (width + Tile::kN - 1) / Tile::kN;
        const int tiles_m = (hidden_dim + Tile::kM - 1) / Tile::kM;
        const int steps = (num_patches + 63) / 64;
        const int per_split = (steps + num_splits - 1) / num_splits;
        auto split_of = [&](int tile) { return tile / (tiles_m * tiles_n); };
        auto m_of = [&](int tile) { return tile / tiles_n % tiles_m * Tile::kM; };
        auto n_of = [&](int tile) { return tile % tiles_n * Tile::kN; };
        gemm_hopper<Tile>(
            stages, tiles_m * tiles_n * num_splits,
            [&](int tile) { return max(0, min(per_split, steps - split_of(tile) * per_split)); },
            [&](const HopperStage& stage, int tile, int step) {
                const int first = (split_of(tile) * per_split + step) * 64;
                load_operand<typename Tile::A>(stage.a, &dy, stage.full, first, m_of(tile));
                load_operand<typename Tile::B>(stage.b, &rows, stage.full, first, n_of(tile));
            },
            [&](int tile, const auto& c, const auto& store) {
                store(c, [&](int row, int column, float (&values)[8]) {
                    row += m_of(tile), column += n_of(tile);
                    if (row >= hidden_dim) return;
                    float* to = workspace + (int64_t(split_of(tile)) * hidden_dim + row) * width;
#pragma unroll
                    for (int i = 0; i < 8; ++i)
                        if (column + i < width) to[column + i] = values[i];
                });
            });
    }
}

}  // namespace vlmkernels
