// The forward product from bytes on Hopper. Patches are read once, kept in shared memory as bytes
// where a whole tile of them fits, and multiplied with all tiles of the weight in turn: consumers
// make 16-bit elements of them in registers, which wgmma takes as its operand a.
//   warp 0           one thread brings the weight, 32 columns of k at a time, by TMA
//   warps 1 to 3     read patches and write panels of 32 columns into a ring; each panel has its
//                    own barriers, so that multiplying begins with the first
//   warpgroups 1, 2  multiply, 64 patches each; the last tile of the weight frees the panels
#pragma once

#include "common/gemm_hopper.cuh"
#include "patch_embed/hopper.cuh"
#include "patch_embed/readers.cuh"

namespace vlmkernels {

template <class Element, int n, int panels, int stages>
struct ResidentTile {
    using T = Element;
    static constexpr int kM = 128, kN = n, kK = 32, kPanels = panels, kStages = stages;
    static constexpr int kThreads = 384, kGatherers = 96;
    using B = SharedTile<n, kK>;
    using Accumulators = float[n / 8][4];
    // A panel is two groups of 16 columns, a group 16 bytes of each patch.
    static constexpr int kGroupBytes = kM * 16, kPanelBytes = 2 * kGroupBytes;
    static constexpr int kPanelStart = stages * B::kBytes;
    static constexpr int kBarrierStart = kPanelStart + panels * kPanelBytes;
    static constexpr int kSharedBytes =
        kBarrierStart + PipelineBarriers<stages>::kBytes + PipelineBarriers<panels>::kBytes;
    static_assert(kSharedBytes <= 227 * 1024);
};

// The items (weight tile fastest) of this CTA: `each`, next to each other.
struct ResidentItems {
    int count, tiles_n, each;
    int uses;  // items that patches are read for: tiles_n or 1

    // Counted again where they are asked for: multiplying has no register to keep them in.
    __device__ int begin() const { return min(cta() * each, count); }
    __device__ int end() const { return min(cta() * each + each, count); }
    // Item i is the first, the last of this CTA for its patches.
    __device__ bool first(int i) const { return i == begin() || i % uses == 0; }
    __device__ bool last(int i) const { return i == end() - 1 || i % uses == uses - 1; }

  private:
    __device__ static int cta() {
        int x;
        asm volatile("mov.u32 %0, %%ctaid.x;\n" : "=r"(x));
        return x;
    }
};

// 16 columns of a patch in the order of wgmma's fragments: lane % 4 has word lane % 4.
__device__ inline void store_group(uint32_t to, const uint32_t* columns) {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
        words[i] = __byte_perm(columns[i / 2], columns[i / 2 + 2], i % 2 ? 0x7632 : 0x5410);
    store_shared(to, words);
}

// The patches from m on, from the ring's group `begin` on: of each patch as many groups as are read
// at once, then those of all patches before the next; a warp takes 32 patches. wait(i) before panel
// i and those before it are written, announce(i) when this thread has written its part of those
// before i.
template <class Tile, class Reader, int kGatherers, class View, class Wait, class Announce>
__device__ void gather_tile(uint32_t panels, int begin, int m, const View& x, int thread,
                            Wait&& wait, Announce&& announce) {
    constexpr int kRead = Reader::kGroups, kGroupBytes = Tile::kGroupBytes;
    const uint32_t end = panels + Tile::kPanels * Tile::kPanelBytes;
    const int num_panels = (x.num_columns + 31) / 32;
    const int num_tasks = (num_panels * 2 + kRead - 1) / kRead * Tile::kM;
    int patch = -1;
    PixelRow row;
    for (int task = thread; task < num_tasks; task += kGatherers) {
        const int to = task % Tile::kM, first = task / Tile::kM * kRead;
        if (const int next = min(m + to, x.num_rows - 1); next != patch) row = x.row(patch = next);
        uint32_t words[kRead * 4];
        Reader::read(words, x, row, patch == m + to, first * 16);
        wait(min((first + kRead - 1) / 2, num_panels - 1));
        uint32_t at = panels + (begin + first) % (Tile::kPanels * 2) * kGroupBytes;
#pragma unroll
        for (int i = 0; i < kRead; ++i) {
            if (first + i < num_panels * 2) store_group(at + to * 16, words + i * 4);
            at = at + kGroupBytes == end ? panels : at + kGroupBytes;
        }
        announce(min((task + kGatherers) / Tile::kM * kRead / 2, num_panels));
    }
    announce(num_panels);
}

// What this CTA's items need, one tile of patches after the other. Where a tile fits in the ring,
// consumers have gathered the first one.
template <class Tile, class Reader, class View>
__device__ void gather_panels(uint32_t panels, PipelineBarriers<Tile::kPanels> barriers,
                              const ResidentItems& items, const View& x, int thread) {
    PipelineState<Tile::kPanels> free, done;  // the next to be waited for, to be announced
    const int num_panels = (x.num_columns + 31) / 32;
    int before = 0, num_free = 0, num_done = 0;  // panels of tiles before; waited for; announced
    auto wait = [&](int last) {
        for (; num_free <= before + last; ++num_free, free.advance()) barriers.wait_empty(free);
    };
    auto announce = [&](int whole) {
        for (; num_done < before + whole; ++num_done, done.advance())
            mbarrier_arrive(barriers.full(done));
    };
    for (int item = items.begin(); item < items.end(); ++item) {
        if (!items.first(item)) continue;
        if (item == items.begin() && num_panels <= Tile::kPanels) {
            wait(num_panels - 1);
            announce(num_panels);
        } else {
            gather_tile<Tile, Reader, Tile::kGatherers>(
                panels, before * 2, item / items.tiles_n * Tile::kM, x, thread, wait, announce);
        }
        before += num_panels;
    }
}

__device__ inline uint32_t load_word(uint32_t shared) {
    uint32_t word;
    asm volatile("ld.shared.b32 %0, [%1];\n" : "=r"(word) : "r"(shared) : "memory");
    return word;
}

template <class Tile>
__device__ void multiply_resident(uint32_t shared, PipelineBarriers<Tile::kStages> weights,
                                  PipelineBarriers<Tile::kPanels> patches,
                                  const ResidentItems& items, int num_steps,
                                  const PatchEmbedEpilogue<typename Tile::T>& epilogue) {
    using B = typename Tile::B;
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 - 64;  // the warp's first
    const uint32_t words = shared + Tile::kPanelStart + (row + lane / 4) * 16 + lane % 4 * 4;
    PipelineState<Tile::kStages> at;
    auto release = [&](int back) {  // the stage that many steps before
        if (lane == 0) weights.release({(at.stage + Tile::kStages - back) % Tile::kStages, 0});
    };
    PipelineState<Tile::kPanels> start;  // of the item's patches
    bool first = true;
    for (int item = items.begin(); item < items.end(); ++item) {
        typename Tile::Accumulators c;
        const bool last = items.last(item);
        auto panel = start;
        auto multiply = [&](uint32_t (&a)[2][4], int step) {
            if (first) patches.wait_full(panel);
#pragma unroll
            for (int k = 0; k < 2; ++k)
#pragma unroll
                for (int half = 0; half < 2; ++half)
                    from_signed_bytes(load_word(words + panel.stage * Tile::kPanelBytes +
                                                k * Tile::kGroupBytes + half * 8 * 16),
                                      a[k][half], a[k][half + 2], typename Tile::T());
            if (last) {
                __syncwarp();
                if (lane == 0) patches.release(panel);
            }
            panel.advance();
            weights.wait_full(at);
            const uint32_t b = shared + at.stage * B::kBytes;
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < 2; ++k)
                wgmma<typename Tile::T, Major::kK, Major::kK>(c, a[k], B::k_major(b) + B::k_step(k),
                                                              step > 0 || k > 0);
            wgmma_commit();
            at.advance();
            if (step == 0) return;
            wgmma_wait<1>();
            release(2);
        };
        uint32_t a[2][2][4];  // of two steps: one is multiplied while the other is made
        for (int step = 0; step < num_steps; step += 2) {
            multiply(a[0], step);
            if (step + 1 < num_steps) multiply(a[1], step + 1);
        }
        const int m = item / items.tiles_n * Tile::kM, n = item % items.tiles_n * Tile::kN;
        const TokenBias<Tile::kN / 8> bias(epilogue, n);
        wgmma_wait<0>();
        release(1);
        if (last) start = panel;
        first = last;
        store_tokens(epilogue, c, bias, m + row, n);
    }
}

template <class Tile>
__device__ void load_resident(uint32_t stages, PipelineBarriers<Tile::kStages> barriers,
                              const ResidentItems& items, const CUtensorMap* weight,
                              int num_steps) {
    PipelineState<Tile::kStages> at;
    for (int item = items.begin(); item < items.end(); ++item)
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
    const __grid_constant__ PatchEmbedEpilogue<typename Tile::T> epilogue,
    const __grid_constant__ ResidentItems items) {
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
        const int num_steps = (x.num_columns + Tile::kK - 1) / Tile::kK;
        const int warpgroup = warp_uniform(threadIdx.x / 128), thread = threadIdx.x - 32;
        if (warpgroup > 0 && num_steps <= Tile::kPanels && items.begin() < items.end())
            with_reader(x, [&]<class Reader>() {
                gather_tile<Tile, Reader, 256>(
                    shared + Tile::kPanelStart, 0, items.begin() / items.tiles_n * Tile::kM, x,
                    threadIdx.x - 128, [](int) {}, [](int) {});
            });
        __syncthreads();
        constexpr int kProducerRegisters = 120, kConsumerRegisters = 192;
        static_assert(registers_fit(Tile::kThreads, kProducerRegisters, kConsumerRegisters));
        if (warpgroup == 0) {
            decrease_registers<kProducerRegisters>();
            if (thread >= 0)
                with_reader(x, [&]<class Reader>() {
                    gather_panels<Tile, Reader>(shared + Tile::kPanelStart, patches, items, x,
                                                thread);
                });
            else if (threadIdx.x == 0)
                load_resident<Tile>(shared, weights, items, &weight, num_steps);
        } else {
            increase_registers<kConsumerRegisters>();
            multiply_resident<Tile>(shared, weights, patches, items, num_steps, epilogue);
        }
    }
}

}  // namespace vlmkernels
