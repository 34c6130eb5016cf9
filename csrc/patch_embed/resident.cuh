// The forward product from bytes on Hopper where a tile of patches fits in shared memory whole: it
// is gathered once, as 16-bit elements, and multiplied with all tiles of the weight in turn.
//   warp 0           one thread brings the weight, 32 columns of k at a time, by TMA
//   warps 1 to 3     read patches, four lines at once by a thread, and write panels of 64 columns,
//                    each of which has its own barriers: the first weight tile is multiplied panel
//                    by panel, and the last one frees them for the next patches
//   warpgroups 1, 2  multiply, 64 patches each; at first, they read as well
#pragma once

#include "common/gemm_hopper.cuh"
#include "patch_embed/hopper.cuh"

namespace vlmkernels {

template <class Element, int patch_w, int panels, int n, int stages>
struct ResidentTile {
    using T = Element;
    static constexpr int kPatchW = patch_w, kPanels = panels;
    static constexpr int kM = 128, kN = n, kRows = 64, kStages = stages, kK = 32;
    static constexpr int kThreads = 384, kGatherers = 96;
    using A = SharedTile<kM, 64 * panels>;
    using B = SharedTile<n, kK>;
    using Accumulators = float[1][n / 8][4];
    static constexpr int kBStart = A::kBytes, kBarrierStart = kBStart + stages * B::kBytes;
    static constexpr int kSharedBytes =
        kBarrierStart + PipelineBarriers<stages>::kBytes + PipelineBarriers<panels>::kBytes;
    static_assert(kSharedBytes <= 227 * 1024);
    // A batch of four lines is whole chunks of 8 columns.
    static constexpr int kLines = 4, kWords = kLines * patch_w / 2;
    static_assert(kWords % 4 == 0);
};

// The items (weight tile fastest) of this CTA: as many as any other has, next to each other.
struct ResidentItems {
    int tiles_n, begin, end;

    __device__ ResidentItems(int tiles_m, int tiles_n) : tiles_n(tiles_n) {
        const int each = (tiles_m * tiles_n + gridDim.x - 1) / gridDim.x;
        begin = min(int(blockIdx.x) * each, tiles_m * tiles_n);
        end = min(begin + each, tiles_m * tiles_n);
    }
    // Item i is the first, the last of this CTA for its patches.
    __device__ bool first(int i) const { return i == begin || i % tiles_n == 0; }
    __device__ bool last(int i) const { return i == end - 1 || i % tiles_n == tiles_n - 1; }
};

// 14 bytes from an even address, and two more, in order. Reads the 16-byte lines that hold them:
// neighbouring lanes then share most of what they read.
__device__ inline void load_14_bytes(uint32_t (&words)[4], const uint8_t* from) {
    const uint32_t skip = uint32_t(reinterpret_cast<uintptr_t>(from)) % 16;
    const auto* lines = reinterpret_cast<const uint4*>(from - skip);
    const uint4 first = lines[0], second = skip > 2 ? lines[1] : make_uint4(0, 0, 0, 0);
    uint32_t a[8] = {first.x, first.y, first.z, first.w, second.x, second.y, second.z, second.w};
#pragma unroll
    for (int i = 0; i < 6; ++i) a[i] = skip & 8 ? a[i + 2] : a[i];
#pragma unroll
    for (int i = 0; i < 5; ++i) a[i] = skip & 4 ? a[i + 1] : a[i];
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i] = __funnelshift_r(a[i], a[i + 1], skip % 4 * 8);
}

// Lines line.. of a patch as words of two elements; zeros where there are none.
template <class Tile>
__device__ void load_lines(uint32_t (&words)[Tile::kWords],
                           const PixelView<const uint8_t, typename Tile::T>& x, const PixelRow& row,
                           bool valid, int line) {
    static_assert(Tile::kPatchW == 14);
    const int num_lines = x.num_columns / Tile::kPatchW;
    uint32_t bytes[Tile::kLines][4];
#pragma unroll
    for (int i = 0; i < Tile::kLines; ++i) {
        bytes[i][0] = bytes[i][1] = bytes[i][2] = bytes[i][3] = 0x80808080;
        if (valid && line + i < num_lines)
            load_14_bytes(bytes[i], x.data + (row + x.column((line + i) * Tile::kPatchW)));
    }
#pragma unroll
    for (int i = 0; i < Tile::kLines; ++i) {
        uint32_t elements[8];
#pragma unroll
        for (int j = 0; j < 4; ++j)
            centre_bytes(bytes[i][j], elements[j * 2], elements[j * 2 + 1], typename Tile::T());
#pragma unroll
        for (int j = 0; j < 7; ++j) words[i * 7 + j] = elements[j];
    }
}

// Batches of lines of the patches from m on, those of all patches before the next: a warp takes 32
// patches of one batch. wait(i) before panels up to i are written, announce(i) when this thread has
// written its part of those before i.
template <class Tile, int kGatherers, class Wait, class Announce>
__device__ void gather_tile(uint32_t shared, int m,
                            const PixelView<const uint8_t, typename Tile::T>& x, int thread,
                            Wait&& wait, Announce&& announce) {
    constexpr int kChunks = Tile::kWords / 4;  // of a batch
    const int num_panels = (x.num_columns + 63) / 64;
    const int num_batches = (x.num_columns / Tile::kPatchW + Tile::kLines - 1) / Tile::kLines;
    for (int task = thread; task < num_batches * Tile::kM; task += kGatherers) {
        const int to = task % Tile::kM, batch = task / Tile::kM, chunk = batch * kChunks;
        uint32_t words[Tile::kWords];
        load_lines<Tile>(words, x, x.row(m + to), m + to < x.num_rows, batch * Tile::kLines);
        wait(min((chunk + kChunks - 1) / 8, num_panels - 1));
#pragma unroll
        for (int i = 0; i < kChunks; ++i) {
            const uint32_t four[4] = {words[i * 4], words[i * 4 + 1], words[i * 4 + 2],
                                      words[i * 4 + 3]};
            store_shared(shared + Tile::A::offset(to, chunk + i), four);
        }
        fence_proxy_async();
        const int next = (task + kGatherers) / Tile::kM;
        announce(next >= num_batches ? num_panels : next * kChunks / 8);
    }
}

// All patch tiles of this CTA but the first.
template <class Tile>
__device__ void gather_resident(uint32_t shared, PipelineBarriers<Tile::kPanels> barriers,
                                const ResidentItems& items,
                                const PixelView<const uint8_t, typename Tile::T>& x, int thread) {
    using Panels = PipelineState<Tile::kPanels>;
    uint32_t phase = 1;
    for (int item = items.begin + 1; item < items.end; ++item) {
        if (!items.first(item)) continue;
        int free = 0, done = 0;
        gather_tile<Tile, Tile::kGatherers>(
            shared, item / items.tiles_n * Tile::kM, x, thread,
            [&](int last) {
                for (; free <= last; ++free) barriers.wait_empty(Panels{free, phase});
            },
            [&](int whole) {
                for (; done < whole; ++done) mbarrier_arrive(barriers.full(Panels{done, phase}));
            });
        phase ^= 1;
    }
}

template <class Tile, class Epilogue>
__device__ void multiply_resident(uint32_t a, PipelineBarriers<Tile::kStages> weights,
                                  PipelineBarriers<Tile::kPanels> patches,
                                  const ResidentItems& items, int num_steps, int consumer,
                                  Epilogue&& epilogue) {
    using Panels = PipelineState<Tile::kPanels>;
    const int lane = threadIdx.x % 32;
    const uint32_t stages = a + Tile::kBStart;
    PipelineState<Tile::kStages> at, before;
    uint32_t phase = 1;
    for (int item = items.begin; item < items.end; ++item) {
        typename Tile::Accumulators c;
        const bool first = item > items.begin && items.first(item), last = items.last(item);
        auto release = [&](int step) {  // the products of this step are over
            if (lane == 0) {
                weights.release(before);
                if (last && (step % 2 || step == num_steps - 1))
                    patches.release(Panels{step / 2, phase});
            }
            before.advance();
        };
        for (int step = 0; step < num_steps; ++step, at.advance()) {
            if (first && step % 2 == 0) patches.wait_full(Panels{step / 2, phase});
            weights.wait_full(at);
            const uint32_t b = stages + at.stage * Tile::B::kBytes;
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < Tile::kK / 16; ++k)
                wgmma<typename Tile::T, Major::kK, Major::kK>(
                    c[0], Tile::A::k_major(a, consumer * 64) + Tile::A::k_step(step * 2 + k),
                    Tile::B::k_major(b) + Tile::B::k_step(k), step > 0 || k > 0);
            wgmma_commit();
            if (step > 0) {
                wgmma_wait<1>();
                release(step - 1);
            }
        }
        wgmma_wait<0>();
        release(num_steps - 1);
        if (last) phase ^= 1;
        epilogue(item, std::as_const(c[0]));
    }
}

template <class Tile>
__device__ void load_resident(uint32_t stages, PipelineBarriers<Tile::kStages> barriers,
                              const ResidentItems& items, const CUtensorMap* weight,
                              int num_steps) {
    PipelineState<Tile::kStages> at;
    for (int item = items.begin; item < items.end; ++item)
        for (int step = 0; step < num_steps; ++step, at.advance()) {
            barriers.wait_empty(at);
            barriers.expect(at, Tile::B::kBytes);
            load_operand<typename Tile::B>(stages + at.stage * Tile::B::kBytes, weight,
                                           barriers.full(at), item % items.tiles_n * Tile::kN,
                                           step * Tile::kK);
        }
}

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1) patch_embed_resident_kernel(
    const __grid_constant__ PixelView<const uint8_t, typename Tile::T> x,
    const __grid_constant__ CUtensorMap weight,
    const __grid_constant__ PatchEmbedEpilogue<typename Tile::T> epilogue) {
    if constexpr (kHopperCode) {
        extern __shared__ __align__(1024) unsigned char stages[];
        const uint32_t shared = shared_address(stages);
        const PipelineBarriers<Tile::kStages> weights{shared + Tile::kBarrierStart};
        const PipelineBarriers<Tile::kPanels> patches{weights.address +
                                                      PipelineBarriers<Tile::kStages>::kBytes};
        if (threadIdx.x == 0) {
            weights.init(1, 8);
            patches.init(Tile::kGatherers, 8);
            fence_mbarrier_init();
        }
        const ResidentItems items((x.num_rows + Tile::kM - 1) / Tile::kM,
                                  (epilogue.y.num_columns + Tile::kN - 1) / Tile::kN);
        const int num_steps = (x.num_columns + Tile::kK - 1) / Tile::kK;
        const int warpgroup = warp_uniform(threadIdx.x / 128);
        if (threadIdx.x >= 32 && items.begin < items.end)
            gather_tile<Tile, Tile::kThreads - 32>(
                shared, items.begin / items.tiles_n * Tile::kM, x, threadIdx.x - 32, [](int) {},
                [](int) {});
        __syncthreads();
        if (warpgroup == 0) {
            decrease_registers<88>();
            if (threadIdx.x >= 32)
                gather_resident<Tile>(shared, patches, items, x, threadIdx.x - 32);
            else if (threadIdx.x == 0)
                load_resident<Tile>(shared + Tile::kBStart, weights, items, &weight, num_steps);
        } else {
            increase_registers<208>();
            multiply_resident<Tile>(shared, weights, patches, items, num_steps, warpgroup - 1,
                                    [&](int item, const auto& c) {
                                        store_tokens(
                                            epilogue, c,
                                            item / items.tiles_n * Tile::kM + (warpgroup - 1) * 64,
                                            item % items.tiles_n * Tile::kN);
                                    });
        }
    }
}

}  // namespace vlmkernels
