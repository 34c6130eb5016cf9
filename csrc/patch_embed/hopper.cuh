// patch_embed from 16-bit elements on Hopper, forward and dx, over common/gemm_hopper.cuh.
// Weights, dy and patch rows come by TMA. Patches of images are gathered by the producer warpgroup:
// a thread walks along the columns of its patch while its neighbours walk along theirs, so that a
// warp reads lines of 32 patches, which lie together. From bytes: resident.cuh. dweight:
// dweight_hopper.cuh.
#pragma once

#include "common/gemm_hopper.cuh"
#include "patch_embed/patch_embed.cuh"
#include "patch_embed/readers.cuh"

namespace vlmkernels {

// Columns column.. of one patch to row `to` of an operand tile, kChunks chunks of 8 from chunk0 on;
// zeros where the patch (valid false) or the column does not exist.
template <class Operand, int kChunks, int kRunBytes, class T>
__device__ void gather_runs(uint32_t tile, int to, int chunk0, const PixelView<const T, T>& x,
                            const PixelRow& row, bool valid, int column) {
    constexpr int kElements = kRunBytes / 2, kRuns = 8 / kElements;
    PixelWalk<kElements, PixelView<const T, T>> walk(x, row, column);
#pragma unroll 2
    for (int i = 0; i < kChunks; ++i) {
        const uint32_t chunk = tile + Operand::offset(to, chunk0 + i);
        const int begin = column + i * 8;
        if constexpr (kRunBytes == 2) {
            uint32_t elements[4] = {};
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                uint32_t element = 0;
                const auto* from =
                    reinterpret_cast<const uint16_t*>(x.data + (row + x.column(begin + j)));
                if (valid && begin + j < x.num_columns) element = *from;
                elements[j / 2] |= element << j % 2 * 16;
            }
            store_shared(chunk, elements);
            continue;
        }
        if constexpr (kRunBytes > 2)
#pragma unroll
            for (int j = 0; j < kRuns; ++j) {
                const T* from = walk.next();
                const bool inside = valid && begin + j * kElements < x.num_columns;
                cp_async<kRunBytes>(chunk + j * kRunBytes, inside ? from : x.data, inside);
            }
    }
}

template <class Operand, int kChunks, class View>
__device__ void gather(uint32_t tile, int to, int chunk0, const View& x, const PixelRow& row,
                       bool valid, int column) {
    auto run = [&]<int kRunBytes>() {
        gather_runs<Operand, kChunks, kRunBytes>(tile, to, chunk0, x, row, valid, column);
    };
    switch (x.run_bytes) {
        case 16: return run.template operator()<16>();
        case 8: return run.template operator()<8>();
        case 4: return run.template operator()<4>();
        default: return run.template operator()<2>();
    }
}

// The bias of kBlocks * 8 columns from n, spread over the lanes of a warp: read it long before it
// is needed.
template <int kBlocks>
class TokenBias {
  public:
    template <class T>
    __device__ TokenBias(const PatchEmbedEpilogue<T>& e, int n) {
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
            const int column = n + (i * 8 + lane_ / 4) * 8 + lane_ % 4 * 2;
            values_[i] = make_float2(0, 0);
            if (column >= e.y.num_columns) continue;
            if (e.float_bias)
                values_[i] = *reinterpret_cast<const float2*>(e.float_bias + column);
            else if (e.bias.num_rows)
                values_[i] =
                    make_float2(float(e.bias.data[column]), float(e.bias.data[column + 1]));
        }
    }
    // Of this thread's columns of a block of 8.
    __device__ float2 operator()(int block) const {
        const int from = block % 8 * 4 + lane_ % 4;
        return {__shfl_sync(~0u, values_[block / 8].x, from),
                __shfl_sync(~0u, values_[block / 8].y, from)};
    }

  private:
    static constexpr int kEach = (kBlocks + 7) / 8;
    const int lane_ = threadIdx.x % 32;
    float2 values_[kEach];
};

// The epilogue of a warp's 16 rows from m and kBlocks * 8 columns from n, straight from the
// accumulators: neighbouring lanes exchange halves, so that a row gets 32 bytes at once. y has rows
// of whole 16 bytes.
template <class T, int kBlocks>
__device__ void store_tokens(const PatchEmbedEpilogue<T>& e, const float (&c)[kBlocks][4],
                             const TokenBias<kBlocks>& bias, int m, int n) {
    constexpr int kBatch = 4;  // blocks whose position embedding is read at once
    static_assert(kBlocks % kBatch == 0);
    const int lane = threadIdx.x % 32, pair = lane % 4 * 2, width = e.y.num_columns - n;
    const bool odd = lane % 2;
    bool inside[2];
    T* to[2];
    const T* positions[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = m + lane / 4 + half * 8;
        inside[half] = row < e.y.num_rows;
        to[half] = e.y.data + e.y.row(row) + n + (odd ? pair + 6 : pair);
        uint32_t position = row;
        e.positions(position);
        positions[half] = e.pos_embed.data + e.pos_embed.row(position) + n + pair;
    }
#pragma unroll
    for (int first = 0; first < kBlocks; first += kBatch) {
        __syncwarp();  // holds the compiler back from starting all at once, in too many registers
        uint32_t added[2][kBatch] = {};
        if (e.pos_embed.num_rows)
#pragma unroll
            for (int i = 0; i < 2 * kBatch; ++i) {
                const int column = (first + i / 2) * 8;
                added[i % 2][i / 2] = *reinterpret_cast<const uint32_t*>(
                    positions[i % 2] + (column < width ? column : 0));
            }
        uint32_t packed[2][kBatch];  // step by step for all, so that no block waits for another
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            const float2 both = bias(first + i);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float* sums = &c[first + i][half * 2];
                const T* two = reinterpret_cast<const T*>(&added[half][i]);
                packed[half][i] = pack<T>(fmaf(sums[0], e.scale, both.x + float(two[0])),
                                          fmaf(sums[1], e.scale, both.y + float(two[1])));
            }
        }
#pragma unroll
        for (int i = 0; i < kBatch; i += 2)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                uint32_t &low = packed[half][i], &high = packed[half][i + 1];
                const uint32_t other = __shfl_xor_sync(~0u, odd ? low : high, 1);
                low = odd ? other : low, high = odd ? high : other;
            }
#pragma unroll
        for (int i = 0; i < kBatch; i += 2)
#pragma unroll
            for (int half = 0; half < 2; ++half)
                if (inside[half] && (first + i) * 8 < width - odd * 8)
                    *reinterpret_cast<uint2*>(to[half] + (first + i) * 8) =
                        make_uint2(packed[half][i], packed[half][i + 1]);
    }
}

// The calling warp's rows of tile (tile_m, tile_n).
template <class Tile, class T>
__device__ void store_tile(const PatchEmbedEpilogue<T>& epilogue, const float (&c)[Tile::kN / 8][4],
                           int tile_m, int tile_n) {
    const int n = tile_n * Tile::kN;
    store_tokens(epilogue, c, TokenBias<Tile::kN / 8>(epilogue, n),
                 tile_m * Tile::kM + int(threadIdx.x) / 32 * 16 - 64, n);
}

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1) patch_embed_hopper_kernel(
    const __grid_constant__ PixelView<const typename Tile::T, typename Tile::T> x,
    const __grid_constant__ CUtensorMap weight,
    const __grid_constant__ PatchEmbedEpilogue<typename Tile::T> epilogue) {
    if constexpr (kHopperCode) {
        extern __shared__ __align__(1024) unsigned char stages[];
        using A = typename Tile::A;
        using B = typename Tile::B;
        const int tiles_n = (epilogue.y.num_columns + Tile::kN - 1) / Tile::kN;
        const int tiles_m = (x.num_rows + Tile::kM - 1) / Tile::kM;
        PixelRow row;
        gemm_hopper<Tile>(
            stages, tiles_m * tiles_n, [&](int) { return (x.num_columns + 63) / 64; },
            [&](const HopperStage& stage, int tile, int step) {
                if (stage.thread == 0) {
                    mbarrier_expect(stage.full, B::kBytes);
                    load_operand<B>(stage.b, &weight, stage.full, tile % tiles_n * Tile::kN,
                                    step * 64);
                }
                const int patch = tile / tiles_n * Tile::kM + stage.thread;
                if (step == 0) row = x.row(patch);
                gather<A, 8>(stage.a, stage.thread, 0, x, row, patch < x.num_rows, step * 64);
            },
            [&](int tile, const auto& c, const auto&) {
                store_tile<Tile>(epilogue, c[0], tile / tiles_n, tile % tiles_n);
            });
    }
}

// Of patch rows: both operands by TMA.
template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1) patch_embed_rows_hopper_kernel(
    const __grid_constant__ CUtensorMap x, const __grid_constant__ CUtensorMap weight,
    const __grid_constant__ PatchEmbedEpilogue<typename Tile::T> epilogue, int patch_dim) {
    if constexpr (kHopperCode) {
        extern __shared__ __align__(1024) unsigned char stages[];
        const int tiles_n = (epilogue.y.num_columns + Tile::kN - 1) / Tile::kN;
        const int tiles_m = (epilogue.y.num_rows + Tile::kM - 1) / Tile::kM;
        gemm_hopper<Tile>(
            stages, tiles_m * tiles_n, [&](int) { return (patch_dim + 63) / 64; },
            [&](const HopperStage& stage, int tile, int step) {
                load_operand<typename Tile::A>(stage.a, &x, stage.full, tile / tiles_n * Tile::kM,
                                               step * 64);
                load_operand<typename Tile::B>(stage.b, &weight, stage.full,
                                               tile % tiles_n * Tile::kN, step * 64);
            },
            [&](int tile, const auto& c, const auto&) {
                store_tile<Tile>(epilogue, c[0], tile / tiles_n, tile % tiles_n);
            });
    }
}

// x: of dx.
template <class Tile, class View>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    patch_embed_dx_hopper_kernel(const __grid_constant__ CUtensorMap dy,
                                 const __grid_constant__ CUtensorMap weight,
                                 const __grid_constant__ View dx, int hidden_dim, float scale) {
    if constexpr (kHopperCode) {
        extern __shared__ __align__(1024) unsigned char stages[];
        const int tiles_n = (dx.num_columns + Tile::kN - 1) / Tile::kN;
        const int tiles_m = (dx.num_rows + Tile::kM - 1) / Tile::kM;
        gemm_hopper<Tile>(
            stages, tiles_m * tiles_n, [&](int) { return (hidden_dim + 63) / 64; },
            [&](const HopperStage& stage, int tile, int step) {
                const int m = tile / tiles_n * Tile::kM, n = tile % tiles_n * Tile::kN;
                load_operand<typename Tile::A>(stage.a, &dy, stage.full, m, step * 64);
                load_operand<typename Tile::B>(stage.b, &weight, stage.full, step * 64, n);
            },
            [&](int tile, const auto& c, const auto& store) {
                const int m = tile / tiles_n * Tile::kM, n = tile % tiles_n * Tile::kN;
                store(c, [&](int row, int column, float (&values)[8]) {
#pragma unroll
                    for (float& value : values) value *= scale;
                    store_values(dx, m + row, n + column, values);
                });
            });
    }
}

}  // namespace vlmkernels
