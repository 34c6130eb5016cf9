// The three kernels of contrastive_fwd.cuh and contrastive_bwd.cuh on Hopper: the same reductions
// and gradients behind gemm_hopper.cuh (TMA, wgmma, persistent CTAs).
#pragma once

#include "common/gemm_hopper.cuh"
#include "contrastive_loss/contrastive_bwd.cuh"
#include "contrastive_loss/contrastive_fwd.cuh"

namespace vlmkernels {

// For tiles of s: a warp holds 16 rows by 256 columns of it.
template <class T>
using LogitsTile = HopperGemmTile<T, 128, 256, 4>;
// For ds text (a K-major) and ds^T image (a MN-major): features lie along n.
template <class T, int n, bool kByText>
using ProductTile =
    HopperGemmTile<T, 128, n, 4, 2, Producer::kTma, kByText ? Major::kMN : Major::kK, Major::kMN>;

// The column results of the four warps of a consumer become one: of 64 rows.
template <class Tile>
struct ColumnExchange {
    Lse* results;  // [4, kN], the consumer's own
    int barrier, thread;

    __device__ void sync() const { named_barrier_sync(barrier, 128); }
    __device__ void combine(Lse* columns, int column0, int num_columns) const {
        sync();
        for (int n = thread; n < Tile::kN && column0 + n < num_columns; n += 128) {
            columns[column0 + n] = merge(4, [&](int warp) { return results[warp * Tile::kN + n]; });
        }
        sync();
    }
};

template <class Tile, bool kSigmoid>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    contrastive_forward_hopper_kernel(const __grid_constant__ CUtensorMap image,
                                      const __grid_constant__ CUtensorMap text, int num_rows,
                                      int num_columns, int dim,
                                      const __grid_constant__ ContrastiveParts<kSigmoid> parts) {
    if constexpr (kHopperCode) {
        extern __shared__ __align__(1024) unsigned char shared[];
        const int tiles_m = (num_rows + Tile::kM - 1) / Tile::kM;
        const int tiles_n = (num_columns + Tile::kN - 1) / Tile::kN;
        gemm_hopper<Tile>(
            shared, tiles_m * tiles_n, [&](int) { return (dim + 63) / 64; },
            [&](const HopperStage& stage, int tile, int step) {
                load_operand<typename Tile::A>(stage.a, &image, stage.full,
                                               tile % tiles_m * Tile::kM, step * 64);
                load_operand<typename Tile::B>(stage.b, &text, stage.full,
                                               tile / tiles_m * Tile::kN, step * 64);
            },
            [&](int tile, const auto& c, const auto& store) {
                const int thread = threadIdx.x % 128, consumer = threadIdx.x / 128 - 1;
                const int row64 = tile % tiles_m * Tile::kM + consumer * 64,
                          row0 = row64 + thread / 32 * 16, column0 = tile / tiles_m * Tile::kN;
                const WarpLogits s(c, parts.scale(), parts.bias(), row0, column0, num_rows,
                                   num_columns, store.lane);
                auto* rows = parts.rows + int64_t(column0 / Tile::kN) * num_rows;
                auto row = [&](int row, auto result) { rows[row] = result; };
                if constexpr (kSigmoid) {
                    part_softplus(s, parts.first_positive, store.lane, row);
                } else {
                    parts.store_positives(s);
                    const ColumnExchange<Tile> exchange{
                        reinterpret_cast<Lse*>(store.part - thread / 32 * Tile::kPieceBytes / 4),
                        1 + consumer, thread};
                    Lse* mine = exchange.results + thread / 32 * Tile::kN;
                    part_lse(s, store.lane, row,
                             [&](int column, Lse lse) { mine[column - column0] = lse; });
                    exchange.combine(parts.columns + int64_t(row64 / 64) * num_columns, column0,
                                     row64 < num_rows ? num_columns : 0);
                }
            });
    }
}

template <class Tile, bool kSigmoid>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    contrastive_ds_hopper_kernel(const __grid_constant__ CUtensorMap image,
                                 const __grid_constant__ CUtensorMap text, int dim,
                                 const __grid_constant__ ContrastiveGradient<kSigmoid> gradient,
                                 const __grid_constant__ MatrixView<typename Tile::T> ds) {
    if constexpr (kHopperCode) {
        extern __shared__ __align__(1024) unsigned char shared[];
        const int tiles_m = (ds.num_rows + Tile::kM - 1) / Tile::kM;
        const int tiles_n = (ds.num_columns + Tile::kN - 1) / Tile::kN;
        float total[2] = {};
        gemm_hopper<Tile>(
            shared, tiles_m * tiles_n, [&](int) { return (dim + 63) / 64; },
            [&](const HopperStage& stage, int tile, int step) {
                load_operand<typename Tile::A>(stage.a, &image, stage.full,
                                               tile % tiles_m * Tile::kM, step * 64);
                load_operand<typename Tile::B>(stage.b, &text, stage.full,
                                               tile / tiles_m * Tile::kN, step * 64);
            },
            [&](int tile, const auto& c, const auto& store) {
                const int m0 = tile % tiles_m * Tile::kM, n0 = tile / tiles_m * Tile::kN;
                store(c, [&](int row, int column, float (&x)[8]) {
                    gradient(m0 + row, n0 + column, x, total);
                    put_ds(ds, m0 + row, n0 + column, x);
                });
            });
        const int warp = threadIdx.x / 32 - 4;  // of the consumers
        if (warp < 0) return;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float sum = lanes_sum<1, 16>(total[i]);
            if (threadIdx.x % 32 == 0)
                gradient.sums[i * gradient.num_sums + blockIdx.x * 8 + warp] += sum;
        }
    }
}

// out = factor ds b, or, kByText, out += factor ds^T b.
template <class Tile, bool kByText>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    contrastive_products_hopper_kernel(const __grid_constant__ CUtensorMap ds,
                                       const __grid_constant__ CUtensorMap b, int depth,
                                       const __grid_constant__ MatrixView<float> out,
                                       const float* factor_, const float* logit_scale, bool grow) {
    if constexpr (kHopperCode) {
        extern __shared__ __align__(1024) unsigned char shared[];
        const int tiles_m = (out.num_rows + Tile::kM - 1) / Tile::kM;
        const int tiles_n = (out.num_columns + Tile::kN - 1) / Tile::kN;
        const float factor = *factor_ * *logit_scale / kHeadroom<typename Tile::T>;
        gemm_hopper<Tile>(
            shared, tiles_m * tiles_n, [&](int) { return (depth + 63) / 64; },
            [&](const HopperStage& stage, int tile, int step) {
                const int m0 = tile / tiles_n * Tile::kM, n0 = tile % tiles_n * Tile::kN;
                load_operand<typename Tile::A>(stage.a, &ds, stage.full, kByText ? step * 64 : m0,
                                               kByText ? m0 : step * 64);
                load_operand<typename Tile::B>(stage.b, &b, stage.full, step * 64, n0);
            },
            [&](int tile, const auto& c, const auto& store) {
                const int m0 = tile / tiles_n * Tile::kM, n0 = tile % tiles_n * Tile::kN;
                store(c, [&](int row, int column, const float (&values)[8]) {
                    put_floats(out, m0 + row, n0 + column, kByText && grow, values, factor);
                });
            });
    }
}

}  // namespace vlmkernels
