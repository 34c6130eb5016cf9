// One PTX instruction of sm_90a per function: mbarriers, TMA, bulk copies, fences, registers.
// Shared-memory addresses are 32-bit (shared_address of ptx.cuh). A kernel that uses them has its
// body under `if constexpr (kHopperCode)`, so that other architectures compile, and is launched
// only where has_hopper() (launch.h) says so. What else is needed:
//   wgmma.cuh         the products             shared_tile.cuh   operand tiles and their
//   descriptors tensor_map.h      CUtensorMap on the host  pipeline.cuh      ring of full and empty
//   mbarriers gemm_hopper.cuh   a whole warp-specialised product
#pragma once

#include <cuda.h>  // CUtensorMap; nothing of libcuda is linked

#include <cstdint>

#include "common/ptx.cuh"

namespace vlmkernels {

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
inline constexpr bool kHopperCode = true;
#else
inline constexpr bool kHopperCode = false;
#endif

// --- mbarrier: a phase completes when all arrivals and all announced bytes are there ---

__device__ inline void mbarrier_init(uint32_t barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(barrier), "r"(arrivals)
                 : "memory");
}
__device__ inline void mbarrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(barrier) : "memory");
}
// An arrival, one of those the barrier was made for, when this thread's cp.async have landed.
__device__ inline void mbarrier_arrive_cp_async(uint32_t barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];\n" ::"r"(barrier)
                 : "memory");
}
// Announces bytes that asynchronous copies will bring; no arrival.
__device__ inline void mbarrier_expect(uint32_t barrier, int bytes) {
    asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;\n" ::"r"(barrier),
                 "r"(bytes)
                 : "memory");
}
__device__ inline void mbarrier_arrive_expect(uint32_t barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(barrier),
                 "r"(bytes)
                 : "memory");
}
// True when the phase of this parity is over; may suspend the thread for a while.
__device__ inline bool mbarrier_try_wait(uint32_t barrier, uint32_t parity) {
    uint32_t done;
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}\n"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
    return done;
}
__device__ inline void mbarrier_wait(uint32_t barrier, uint32_t parity) {
    while (!mbarrier_try_wait(barrier, parity)) {
    }
}

// --- TMA: boxes of a tensor (coordinates innermost first), and runs of bytes ---

__device__ inline void prefetch_tensor_map(const CUtensorMap* map) {
    asm volatile("prefetch.tensormap [%0];\n" ::"l"(map) : "memory");
}
// Copies a box to shared memory and counts its bytes, those outside of the tensor (zeros) included,
// at the barrier.
__device__ inline void tma_load(uint32_t shared, const CUtensorMap* map, uint32_t barrier, int c0,
                                int c1) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4}], [%2];\n" ::"r"(shared),
        "l"(map), "r"(barrier), "r"(c0), "r"(c1)
        : "memory");
}
__device__ inline void tma_load(uint32_t shared, const CUtensorMap* map, uint32_t barrier, int c0,
                                int c1, int c2) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4, %5}], [%2];\n" ::"r"(shared),
        "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2)
        : "memory");
}
__device__ inline void tma_load(uint32_t shared, const CUtensorMap* map, uint32_t barrier, int c0,
                                int c1, int c2, int c3) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4, %5, %6}], [%2];\n" ::"r"(shared),
        "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
        : "memory");
}
__device__ inline void tma_load(uint32_t shared, const CUtensorMap* map, uint32_t barrier, int c0,
                                int c1, int c2, int c3, int c4) {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4, %5, %6, %7}], [%2];\n" ::"r"(shared),
        "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
        : "memory");
}
// Copies a box from shared memory, what lies outside of the tensor excepted. As every read of
// shared memory by the asynchronous proxy it wants fence_proxy_async() after ordinary stores.
__device__ inline void tma_store(const CUtensorMap* map, uint32_t shared, int c0, int c1) {
    asm volatile(
        "cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];\n" ::"l"(
            map),
        "r"(shared), "r"(c0), "r"(c1)
        : "memory");
}
__device__ inline void tma_store(const CUtensorMap* map, uint32_t shared, int c0, int c1, int c2) {
    asm volatile(
        "cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4}], "
        "[%1];\n" ::"l"(map),
        "r"(shared), "r"(c0), "r"(c1), "r"(c2)
        : "memory");
}
__device__ inline void tma_store(const CUtensorMap* map, uint32_t shared, int c0, int c1, int c2,
                                 int c3) {
    asm volatile(
        "cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], "
        "[%1];\n" ::"l"(map),
        "r"(shared), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
        : "memory");
}
// As tma_store, but adds.
__device__ inline void tma_reduce_add(const CUtensorMap* map, uint32_t shared, int c0, int c1) {
    asm volatile(
        "cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.tile.bulk_group [%0, {%2, %3}], "
        "[%1];\n" ::"l"(map),
        "r"(shared), "r"(c0), "r"(c1)
        : "memory");
}
__device__ inline void tma_reduce_add(const CUtensorMap* map, uint32_t shared, int c0, int c1,
                                      int c2) {
    asm volatile(
        "cp.reduce.async.bulk.tensor.3d.global.shared::cta.add.tile.bulk_group [%0, {%2, %3, "
        "%4}], [%1];\n" ::"l"(map),
        "r"(shared), "r"(c0), "r"(c1), "r"(c2)
        : "memory");
}
__device__ inline void tma_reduce_add(const CUtensorMap* map, uint32_t shared, int c0, int c1,
                                      int c2, int c3) {
    asm volatile(
        "cp.reduce.async.bulk.tensor.4d.global.shared::cta.add.tile.bulk_group [%0, {%2, %3, "
        "%4, %5}], [%1];\n" ::"l"(map),
        "r"(shared), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
        : "memory");
}
// Bulk copies: 16-byte aligned addresses, a multiple of 16 bytes.
__device__ inline void bulk_load(uint32_t shared, const void* global, int bytes, uint32_t barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, "
        "[%3];\n" ::"r"(shared),
        "l"(global), "r"(bytes), "r"(barrier)
        : "memory");
}
__device__ inline void bulk_store(void* global, uint32_t shared, int bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;\n" ::"l"(global),
                 "r"(shared), "r"(bytes)
                 : "memory");
}
__device__ inline void bulk_reduce_add(float* global, uint32_t shared, int bytes) {
    asm volatile(
        "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;\n" ::"l"(
            global),
        "r"(shared), "r"(bytes)
        : "memory");
}
// Groups of this thread's stores and reductions: the memory is written (wait), or the shared memory
// has been read (wait_read), of all but the last kPending.
__device__ inline void bulk_commit() { asm volatile("cp.async.bulk.commit_group;\n" ::: "memory"); }
template <int kPending>
__device__ inline void bulk_wait() {
    asm volatile("cp.async.bulk.wait_group %0;\n" ::"n"(kPending) : "memory");
}
template <int kPending>
__device__ inline void bulk_wait_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;\n" ::"n"(kPending) : "memory");
}

// --- Fences ---

// Between ordinary (or cp.async) writes to shared memory and their reads by wgmma or TMA; also
// between ordinary reads and what TMA writes in the same place next.
__device__ inline void fence_proxy_async() {
    asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
}
// Between mbarrier_init and the first use by other threads or by TMA; __syncthreads() follows.
__device__ inline void fence_mbarrier_init() {
    asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
}

// --- wgmma groups (the products are in wgmma.cuh) ---

__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }
__device__ inline void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
}
template <int kPending>
__device__ inline void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kPending) : "memory");
}

// --- Warpgroups and warps ---

// Registers per thread of the calling warpgroup from here on: a multiple of 8.
template <int kRegisters>
__device__ inline void increase_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}
// Whether setmaxnreg can give a producer warpgroup and the consumers after it as many registers a
// thread: they share what the CTA was launched with, 65536 over its threads in steps of 8; a warp
// that asks for more waits for ever.
constexpr bool registers_fit(int threads, int producer, int consumer) {
    const int warpgroups = threads / 128;
    return producer + (warpgroups - 1) * consumer <= warpgroups * (65536 / threads / 8 * 8);
}
template <int kRegisters>
__device__ inline void decrease_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}
// Barriers 1 to 15 of the CTA (0 is __syncthreads); threads: a multiple of 32, arriving ones
// included.
__device__ inline void named_barrier_sync(int barrier, int threads) {
    asm volatile("bar.sync %0, %1;\n" ::"r"(barrier), "r"(threads) : "memory");
}
__device__ inline void named_barrier_arrive(int barrier, int threads) {
    asm volatile("bar.arrive %0, %1;\n" ::"r"(barrier), "r"(threads) : "memory");
}
// True in one lane of a converged warp.
__device__ inline bool elect_one() {
    uint32_t elected;
    asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p;\n}\n"
                 : "=r"(elected));
    return elected;
}
// The same value in all lanes, which the compiler then knows to be uniform.
__device__ inline int warp_uniform(int x) { return __shfl_sync(~0u, x, 0); }

}  // namespace vlmkernels
