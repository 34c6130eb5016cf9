// A ring of stages between one producer and its consumers, in shared memory.
//   producer                                   consumers
//   barriers.wait_empty(at)                    barriers.wait_full(at)
//   barriers.expect(at, bytes)                 ... read stage at.stage ...
//   tma_load(..., barriers.full(at), ...)      barriers.release(at)     one thread per arrival
//   at.advance()                               at.advance()
// A producer that writes with ordinary stores or cp.async instead lets every thread call
// fence_proxy_async() (once its data has landed) and mbarrier_arrive(barriers.full(at)). A consumer
// that reads with ordinary loads what TMA brought calls it before release().
#pragma once

#include <cstdint>

#include "common/hopper.cuh"

namespace vlmkernels {

// Where in the ring a side is. Both start alike.
template <int kStages>
struct PipelineState {
    int stage = 0;
    uint32_t phase = 0;

    __device__ void advance() {
        if (++stage == kStages) stage = 0, phase ^= 1;
    }
};

template <int kStages>
struct PipelineBarriers {
    static constexpr int kBytes = 2 * kStages * 8;
    using State = PipelineState<kStages>;
    uint32_t address;  // of kBytes of shared memory, 8-byte aligned

    // One thread; fence_mbarrier_init() and __syncthreads() follow.
    __device__ void init(int producer_arrivals, int consumer_arrivals) const {
        for (int stage = 0; stage < kStages; ++stage) {
            mbarrier_init(address + stage * 16, producer_arrivals);
            mbarrier_init(address + stage * 16 + 8, consumer_arrivals);
        }
    }
    __device__ uint32_t full(const State& at) const { return address + at.stage * 16; }
    __device__ uint32_t empty(const State& at) const { return address + at.stage * 16 + 8; }

    __device__ void wait_empty(const State& at) const { mbarrier_wait(empty(at), at.phase ^ 1); }
    __device__ void expect(const State& at, int bytes) const {
        mbarrier_arrive_expect(full(at), bytes);
    }
    __device__ void wait_full(const State& at) const { mbarrier_wait(full(at), at.phase); }
    __device__ void release(const State& at) const { mbarrier_arrive(empty(at)); }
};

}  // namespace vlmkernels
