// c (m, n) = a (m, k) b (k, n) of 16-bit elements on Hopper: the main loop of a persistent,
// warp-specialised kernel. One producer warpgroup fills a ring of stages with tiles of a and b,
// kConsumers warpgroups multiply them with wgmma, each its own rows, and hand out fp32 sums.
//
//   using Tile = HopperGemmTile<__nv_bfloat16, 128, 128, 4>;
//   __global__ void __launch_bounds__(Tile::kThreads, 1) kernel(const __grid_constant__ CUtensorMap
//                                                               a, const __grid_constant__ ... b) {
//       if constexpr (kHopperCode) {
//           extern __shared__ __align__(1024) unsigned char shared[];
//           gemm_hopper<Tile>(shared, num_tiles, [&](int tile) { return num_steps; },
//               [&](const HopperStage& stage, int tile, int step) {           // producer
//                   load_operand<typename Tile::A>(stage.a, &a, stage.full, row, step * 64);
//                   load_operand<typename Tile::B>(stage.b, &b, stage.full, column, step * 64);
//               },
//               [&](int tile, const auto& c, const auto& store) {             // consumer
//                   store(c, [&](int row, int column, const float (&values)[8]) { ... });
//               });
//       }
//   }
//   launch(kernel, std::min(num_tiles, num_sms), Tile::kThreads, Tile::kSharedBytes, ...)
//
// A CTA takes the tiles blockIdx.x, blockIdx.x + gridDim.x, ... A step is 64 of k; what of a step
// lies beyond the end of k must be zero in a and in b, which TMA does by itself.
// An operand is K-major (its rows in memory run along k) or MN-major (along m or n): tiles of
// SharedTile<m or n, 64> or <64, m or n>. Tensor maps: see operand_map().
#pragma once

#include <cuda_runtime.h>

#include <utility>

#include "common/hopper.cuh"
#include "common/pipeline.cuh"
#include "common/shared_tile.cuh"
#include "common/tensor_map.h"
#include "common/wgmma.cuh"

namespace vlmkernels {

// Who fills a stage.
enum class Producer {
    kTma,     // one thread; load() issues TMA copies of exactly both tiles
    kThreads  // 128 threads: load() writes with cp.async or stores, the tiles' bytes at
              // Tile::A::offset() and Tile::B::offset(); thread 0 may bring parts by TMA, after
              // mbarrier_expect(stage.full, bytes)
};

template <class Element, int m, int n, int stages, int consumers = 2,
          Producer producer = Producer::kTma, Major major_a = Major::kK, Major major_b = Major::kK>
struct HopperGemmTile {
    using T = Element;
    static constexpr int kM = m, kN = n, kK = 64, kStages = stages, kConsumers = consumers;
    static constexpr Producer kProducer = producer;
    static constexpr Major kMajorA = major_a, kMajorB = major_b;
    using A = std::conditional_t<major_a == Major::kK, SharedTile<m, kK>, SharedTile<kK, m>>;
    using B = std::conditional_t<major_b == Major::kK, SharedTile<n, kK>, SharedTile<kK, n>>;
    static constexpr int kThreads = 128 * (consumers + 1);
    static constexpr int kRows = m / consumers;  // of a consumer warpgroup
    using Accumulators = float[kRows / 64][n / 8][4];
    // c goes through shared memory in pieces of 16 rows and kPiece columns for each warp.
    static constexpr int kPiece = n % 64 == 0 ? 64 : n % 32 == 0 ? 32 : n % 16 == 0 ? 16 : 8;
    static constexpr int kPieceBytes = 16 * kPiece * 4;
    static constexpr int kStageBytes = A::kBytes + B::kBytes;
    static constexpr int kPieceStart = stages * kStageBytes;
    static constexpr int kBarrierStart = kPieceStart + consumers * 4 * kPieceBytes;
    static constexpr int kSharedBytes = kBarrierStart + PipelineBarriers<stages>::kBytes;
    // setmaxnreg, from 168 each; one consumer has enough without.
    static constexpr int kProducerRegisters = producer == Producer::kTma ? 40 : 56;
    static constexpr int kConsumerRegisters = producer == Producer::kTma ? 232 : 224;
    static_assert(consumers == 1 ||
                  registers_fit(kThreads, kProducerRegisters, kConsumerRegisters));
    // Producer::kThreads: stages whose cp.async are still under way; consumers keep one until they
    // have the next. 0 where load() only stores.
    static constexpr int kLag = stages - 2;
    static_assert(consumers == 1 || consumers == 2);
    static_assert(kRows % 64 == 0 && n % 8 == 0 && n <= 256 && stages >= 2);
    static_assert(kRows / 64 * n <= 256, "accumulators are registers: 128 per thread, at 64 x 256");
    static_assert(kStageBytes % 1024 == 0 && A::kBytes % 1024 == 0 && kSharedBytes <= 227 * 1024);
};

struct HopperStage {
    uint32_t a, b;  // shared addresses of the tiles
    uint32_t full;  // the barrier at which their bytes count
    int thread;     // 0 with Producer::kTma, 0 to 127 with Producer::kThreads
};

// Copies the tile of rows row.. and columns column.. of a row-major matrix (or of one slice of a
// 3-D tensor) by TMA. The map's box: SharedTile's panel, all rows by kPanelColumns.
template <class SharedTile, class... Slice>
__device__ void load_operand(uint32_t tile, const CUtensorMap* map, uint32_t barrier, int row,
                             int column, Slice... slice) {
#pragma unroll
    for (int panel = 0; panel < SharedTile::kPanels; ++panel)
        tma_load(tile + panel * SharedTile::kPanelBytes, map, barrier,
                 column + panel * SharedTile::kPanelColumns, row, slice...);
}

// The map of a row-major matrix (num_rows, num_columns) for load_operand<SharedTile>.
template <class SharedTile>
Error operand_map(CUtensorMap* map, const void* data, DType dtype, int64_t num_rows,
                  int64_t num_columns, int64_t row_stride) {
    return encode_tensor_map(
        map, data, dtype,
        {{num_columns, 1, SharedTile::kPanelColumns}, {num_rows, row_stride, SharedTile::kRows}},
        SharedTile::kSwizzle);
}

template <class Tile, class Steps, class Load>
__device__ void produce_stages(uint32_t shared, PipelineBarriers<Tile::kStages> barriers,
                               int num_tiles, int thread, Steps&& steps, Load&& load) {
    constexpr bool kTma = Tile::kProducer == Producer::kTma;
    constexpr int kLag = Tile::kLag;
    PipelineState<Tile::kStages> at, landed;
    int in_flight = 0;
    auto announce = [&] {
        fence_proxy_async();
        mbarrier_arrive(barriers.full(landed));
        landed.advance();
        --in_flight;
    };
    for (int tile = blockIdx.x; tile < num_tiles; tile += gridDim.x) {
        const int num_steps = steps(tile);
        for (int step = 0; step < num_steps; ++step, at.advance()) {
            barriers.wait_empty(at);
            const uint32_t a = shared + at.stage * Tile::kStageBytes;
            const HopperStage stage{a, a + Tile::A::kBytes, barriers.full(at), thread};
            if constexpr (kTma) {
                barriers.expect(at, Tile::kStageBytes);
                load(stage, tile, step);
            } else {
                load(stage, tile, step);
                cp_async_commit();
                if (++in_flight > kLag) cp_async_wait<kLag>(), announce();
            }
        }
    }
    if constexpr (!kTma) {
        cp_async_wait<0>();
        while (in_flight > 0) announce();
    }
}

// Hands a consumer's c out in rows: calls store(row, column, values) with rows and columns within
// the CTA's tile and 8 values each, neighbouring lanes with neighbouring columns.
template <class Tile>
struct RowStore {
    float* part;  // the warp's own
    int lane, row0;

    template <class Store>
    __device__ void operator()(const typename Tile::Accumulators& c, Store&& store) const {
        constexpr int kPiece = Tile::kPiece, kChunks = kPiece / 8;
        auto at = [&](int row, int chunk, int half) {  // half a chunk; permuted
            chunk ^= row % kChunks;
            return part + row * kPiece + chunk * 8 + (half ^ chunk / 4 % 2) * 4;
        };
#pragma unroll
        for (int m = 0; m < Tile::kRows / 64; ++m)
#pragma unroll
            for (int piece = 0; piece < Tile::kN / kPiece; ++piece) {
#pragma unroll
                for (int j = 0; j < kChunks; ++j)
#pragma unroll
                    for (int below = 0; below < 2; ++below) {
                        const float* pair = &c[m][piece * kChunks + j][below * 2];
                        *reinterpret_cast<float2*>(at(lane / 4 + below * 8, j, lane % 4 / 2) +
                                                   lane % 2 * 2) = make_float2(pair[0], pair[1]);
                    }
                __syncwarp();
                for (int index = lane; index < 16 * kChunks; index += 32) {
                    const int row = index / kChunks, chunk = index % kChunks;
                    float values[8];
#pragma unroll
                    for (int half = 0; half < 2; ++half)
                        *reinterpret_cast<float4*>(values + half * 4) =
                            *reinterpret_cast<const float4*>(at(row, chunk, half));
                    store(row0 + m * 64 + row, piece * kPiece + chunk * 8, values);
                }
                __syncwarp();
            }
    }
};

// c += a b of one stage, rows row0.. of a; asynchronous.
template <class Tile>
__device__ void multiply_stage(typename Tile::Accumulators& c, uint32_t a, uint32_t b, int row0,
                               bool accumulate) {
    using A = typename Tile::A;
    using B = typename Tile::B;
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < Tile::kK / 16; ++k) {
        const uint64_t from_b = Tile::kMajorB == Major::kK ? B::k_major(b) + B::k_step(k)
                                                           : B::mn_major(b) + B::mn_step(k);
#pragma unroll
        for (int m = 0; m < Tile::kRows / 64; ++m) {
            const int row = row0 + m * 64;
            const uint64_t from_a = Tile::kMajorA == Major::kK
                                        ? A::k_major(a, row) + A::k_step(k)
                                        : A::mn_major(a, row / A::kPanelColumns) + A::mn_step(k);
            wgmma<typename Tile::T, Tile::kMajorA, Tile::kMajorB>(c[m], from_a, from_b,
                                                                  accumulate || k > 0);
        }
    }
    wgmma_commit();
}

template <class Tile, class Steps, class Epilogue>
__device__ void consume_stages(unsigned char* shared, PipelineBarriers<Tile::kStages> barriers,
                               int num_tiles, int consumer, Steps&& steps, Epilogue&& epilogue) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    float* part = reinterpret_cast<float*>(shared + Tile::kPieceStart +
                                           (consumer * 4 + warp) * Tile::kPieceBytes);
    const RowStore<Tile> store{part, lane, consumer * Tile::kRows + warp * 16};
    PipelineState<Tile::kStages> at, before;
    for (int tile = blockIdx.x; tile < num_tiles; tile += gridDim.x) {
        typename Tile::Accumulators c;
        const int num_steps = steps(tile);
        if (num_steps == 0)
#pragma unroll
            for (auto& rows : c)
#pragma unroll
                for (auto& chunk : rows) chunk[0] = chunk[1] = chunk[2] = chunk[3] = 0;
        for (int step = 0; step < num_steps; ++step, at.advance()) {
            barriers.wait_full(at);
            const uint32_t a = shared_address(shared) + at.stage * Tile::kStageBytes;
            multiply_stage<Tile>(c, a, a + Tile::A::kBytes, consumer * Tile::kRows, step > 0);
            if (step > 0) {  // the products before are over: their stage is free
                wgmma_wait<1>();
                if (lane == 0) barriers.release(before);
                before.advance();
            }
        }
        wgmma_wait<0>();
        if (num_steps > 0) {
            if (lane == 0) barriers.release(before);
            before.advance();
        }
        epilogue(tile, std::as_const(c), store);
    }
}

// num_steps(tile): of 64 of k, the same answer in every thread. load(stage, tile, step) and
// epilogue(tile, c, store): see the top. shared: Tile::kSharedBytes, 1024-byte aligned.
template <class Tile, class Steps, class Load, class Epilogue>
__device__ void gemm_hopper(unsigned char* shared, int num_tiles, Steps&& num_steps, Load&& load,
                            Epilogue&& epilogue) {
    constexpr bool kTma = Tile::kProducer == Producer::kTma;
    const PipelineBarriers<Tile::kStages> barriers{shared_address(shared) + Tile::kBarrierStart};
    if (threadIdx.x == 0) {
        barriers.init(kTma ? 1 : 128, Tile::kConsumers * 4);
        fence_mbarrier_init();
    }
    __syncthreads();
    const int warpgroup = warp_uniform(threadIdx.x / 128);
    if (warpgroup == 0) {
        if constexpr (Tile::kConsumers == 2) decrease_registers<Tile::kProducerRegisters>();
        const int thread = threadIdx.x;
        if (!kTma || thread == 0)
            produce_stages<Tile>(shared_address(shared), barriers, num_tiles, thread, num_steps,
                                 load);
    } else {
        if constexpr (Tile::kConsumers == 2) increase_registers<Tile::kConsumerRegisters>();
        consume_stages<Tile>(shared, barriers, num_tiles, warpgroup - 1, num_steps, epilogue);
    }
}

}  // namespace vlmkernels
