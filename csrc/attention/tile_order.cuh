// Tiles of packed sequences, those with the most work first: persistent CTAs that take them in turn
// have equally much, whatever the lengths, and none meets a tile without rows.
#pragma once

#include <cuda_runtime.h>

#include "attention/sequence.cuh"
#include "common/launch.cuh"

namespace vlmkernels {

// Writes tile_order by counting sort: a warp per sequence, a bin per thread. In which order a bin's
// tiles come is not certain; no result depends on it.
inline constexpr int kTileOrderThreads = 1024;
__global__ void __launch_bounds__(kTileOrderThreads)
    attention_tile_order_kernel(const AttentionParams p, int rows, bool of_keys) {
    __shared__ int start[kTileOrderThreads], warp_sums[32];
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    auto for_tiles = [&](auto&& f) {
        for (int batch = warp; batch < p.batch; batch += 32) {
            const Sequence s(p, batch);
            const int seqlen = of_keys ? s.seqlen_k : s.seqlen_q;
            for (int block = lane; int64_t(block) * rows < seqlen; block += 32) {
                const int first = block * rows, last = min(first + rows, seqlen) - 1;
                const int met = of_keys ? s.queries_of(last).end - s.queries_of(first).begin
                                        : s.keys_of(last).end - s.keys_of(first).begin;
                const int most = of_keys ? p.seqlen_q : p.seqlen_k;
                f(kTileOrderThreads - 1 -
                      int(int64_t(max(met, 0)) * (kTileOrderThreads - 1) / most),
                  make_int2(block, batch));
            }
        }
    };
    start[thread] = 0;
    __syncthreads();
    for_tiles([&](int bin, int2) { atomicAdd(&start[bin], 1); });
    __syncthreads();
    auto sum_to_lane = [&](int x) {
        for (int offset = 1; offset < 32; offset *= 2) {
            const int below = __shfl_up_sync(~0u, x, offset);
            if (lane >= offset) x += below;
        }
        return x;
    };
    const int count = start[thread], sum = sum_to_lane(count);
    if (lane == 31) warp_sums[warp] = sum;
    __syncthreads();
    if (warp == 0) warp_sums[lane] = sum_to_lane(warp_sums[lane]);
    __syncthreads();
    start[thread] = sum - count + (warp > 0 ? warp_sums[warp - 1] : 0);
    int2* order = reinterpret_cast<int2*>(p.tile_order);
    if (thread == 0) order[0] = make_int2(min(warp_sums[31], p.tile_slots), 0);
    __syncthreads();
    for_tiles([&](int bin, int2 tile) {
        const int at = atomicAdd(&start[bin], 1);
        if (at < p.tile_slots) order[1 + at] = tile;  // more only if cu_seqlens are wrong
    });
}

Error attention_tile_order(const AttentionParams& p, int rows, bool of_keys, Stream stream) {
    return launch(attention_tile_order_kernel, 1, kTileOrderThreads, 0, stream, p, rows, of_keys);
}

}  // namespace vlmkernels
