// wgmma: c (64 x kN, fp32) += a (64 x 16) b (16 x kN) of 16-bit elements by the four warps of a
// warpgroup, asynchronously: wgmma_fence() before the first, wgmma_commit() after the last,
// wgmma_wait() before c is touched (hopper.cuh). kN is any multiple of 8 up to 256.
//   c   c[n][e] of the thread is row 16 warp + lane / 4 + 8 (e / 2), column 8 n + 2 (lane % 4) + e
//   % 2:
//       the fragment of mma.m16n8k16, so that what works on its accumulators works on these
//   a   in shared memory (descriptor), or in registers: the fragment a of mma.m16n8k16 (pack_a)
//   b   in shared memory
// Descriptors come from SharedTile (shared_tile.cuh). Major::kMN: the tile is stored transposed,
// that is with k as its rows.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace vlmkernels {

enum class Major { kK = 0, kMN = 1 };

// The text of the accumulators, four at a time; a wider c begins like a narrower one.
#define VLM_D8 "%0, %1, %2, %3"
#define VLM_D16 VLM_D8 ", %4, %5, %6, %7"
#define VLM_D24 VLM_D16 ", %8, %9, %10, %11"
#define VLM_D32 VLM_D24 ", %12, %13, %14, %15"
#define VLM_D40 VLM_D32 ", %16, %17, %18, %19"
#define VLM_D48 VLM_D40 ", %20, %21, %22, %23"
#define VLM_D56 VLM_D48 ", %24, %25, %26, %27"
#define VLM_D64 VLM_D56 ", %28, %29, %30, %31"
#define VLM_D72 VLM_D64 ", %32, %33, %34, %35"
#define VLM_D80 VLM_D72 ", %36, %37, %38, %39"
#define VLM_D88 VLM_D80 ", %40, %41, %42, %43"
#define VLM_D96 VLM_D88 ", %44, %45, %46, %47"
#define VLM_D104 VLM_D96 ", %48, %49, %50, %51"
#define VLM_D112 VLM_D104 ", %52, %53, %54, %55"
#define VLM_D120 VLM_D112 ", %56, %57, %58, %59"
#define VLM_D128 VLM_D120 ", %60, %61, %62, %63"
#define VLM_D136 VLM_D128 ", %64, %65, %66, %67"
#define VLM_D144 VLM_D136 ", %68, %69, %70, %71"
#define VLM_D152 VLM_D144 ", %72, %73, %74, %75"
#define VLM_D160 VLM_D152 ", %76, %77, %78, %79"
#define VLM_D168 VLM_D160 ", %80, %81, %82, %83"
#define VLM_D176 VLM_D168 ", %84, %85, %86, %87"
#define VLM_D184 VLM_D176 ", %88, %89, %90, %91"
#define VLM_D192 VLM_D184 ", %92, %93, %94, %95"
#define VLM_D200 VLM_D192 ", %96, %97, %98, %99"
#define VLM_D208 VLM_D200 ", %100, %101, %102, %103"
#define VLM_D216 VLM_D208 ", %104, %105, %106, %107"
#define VLM_D224 VLM_D216 ", %108, %109, %110, %111"
#define VLM_D232 VLM_D224 ", %112, %113, %114, %115"
#define VLM_D240 VLM_D232 ", %116, %117, %118, %119"
#define VLM_D248 VLM_D240 ", %120, %121, %122, %123"
#define VLM_D256 VLM_D248 ", %124, %125, %126, %127"

#define VLM_C(n) "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3])
#define VLM_C8 VLM_C(0)
#define VLM_C16 VLM_C8, VLM_C(1)
#define VLM_C24 VLM_C16, VLM_C(2)
#define VLM_C32 VLM_C24, VLM_C(3)
#define VLM_C40 VLM_C32, VLM_C(4)
#define VLM_C48 VLM_C40, VLM_C(5)
#define VLM_C56 VLM_C48, VLM_C(6)
#define VLM_C64 VLM_C56, VLM_C(7)
#define VLM_C72 VLM_C64, VLM_C(8)
#define VLM_C80 VLM_C72, VLM_C(9)
#define VLM_C88 VLM_C80, VLM_C(10)
#define VLM_C96 VLM_C88, VLM_C(11)
#define VLM_C104 VLM_C96, VLM_C(12)
#define VLM_C112 VLM_C104, VLM_C(13)
#define VLM_C120 VLM_C112, VLM_C(14)
#define VLM_C128 VLM_C120, VLM_C(15)
#define VLM_C136 VLM_C128, VLM_C(16)
#define VLM_C144 VLM_C136, VLM_C(17)
#define VLM_C152 VLM_C144, VLM_C(18)
#define VLM_C160 VLM_C152, VLM_C(19)
#define VLM_C168 VLM_C160, VLM_C(20)
#define VLM_C176 VLM_C168, VLM_C(21)
#define VLM_C184 VLM_C176, VLM_C(22)
#define VLM_C192 VLM_C184, VLM_C(23)
#define VLM_C200 VLM_C192, VLM_C(24)
#define VLM_C208 VLM_C200, VLM_C(25)
#define VLM_C216 VLM_C208, VLM_C(26)
#define VLM_C224 VLM_C216, VLM_C(27)
#define VLM_C232 VLM_C224, VLM_C(28)
#define VLM_C240 VLM_C232, VLM_C(29)
#define VLM_C248 VLM_C240, VLM_C(30)
#define VLM_C256 VLM_C248, VLM_C(31)

// One shape: the numbers are those of the operands that follow c.
#define VLM_SS(N, type, i0, i1, i2, i3, i4)                                                    \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #i2                                      \
                 ", 0;\n"                                                                      \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." type "." type " {" VLM_D##N \
                 "}, %" #i0 ", %" #i1 ", p, 1, 1, %" #i3 ", %" #i4 ";\n}\n"                    \
                 : VLM_C##N                                                                    \
                 : "l"(a), "l"(b), "r"(int(accumulate)), "n"(int(kMajorA)), "n"(int(kMajorB)))
#define VLM_RS(N, type, i0, i1, i2, i3, i4, i5, i6)                                               \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #i5                                         \
                 ", 0;\n"                                                                         \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." type "." type " {" VLM_D##N    \
                 "}, {%" #i0 ", %" #i1 ", %" #i2 ", %" #i3 "}, %" #i4 ", p, 1, 1, %" #i6 ";\n}\n" \
                 : VLM_C##N                                                                       \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)),      \
                   "n"(int(kMajorB)))
#define VLM_WGMMA(N, i0, i1, i2, i3, i4, i5, i6)       \
    if constexpr (kN == N && kFromShared && kBf16)     \
        VLM_SS(N, "bf16", i0, i1, i2, i3, i4);         \
    else if constexpr (kN == N && kFromShared)         \
        VLM_SS(N, "f16", i0, i1, i2, i3, i4);          \
    else if constexpr (kN == N && kBf16)               \
        VLM_RS(N, "bf16", i0, i1, i2, i3, i4, i5, i6); \
    else if constexpr (kN == N)                        \
        VLM_RS(N, "f16", i0, i1, i2, i3, i4, i5, i6);

// a: uint64_t (descriptor) or uint32_t[4] (registers). accumulate false: c = a b.
template <class T, Major kMajorA, Major kMajorB, int kBlocks, class A>
__device__ __forceinline__ void wgmma(float (&c)[kBlocks][4], const A& a, uint64_t b,
                                      bool accumulate = true) {
    constexpr int kN = kBlocks * 8;
    constexpr bool kBf16 = std::is_same_v<T, __nv_bfloat16>;
    constexpr bool kFromShared = std::is_same_v<A, uint64_t>;
    static_assert(kN % 8 == 0 && kN <= 256 && (kBf16 || std::is_same_v<T, __half>));
    static_assert(kFromShared || kMajorA == Major::kK);
    VLM_WGMMA(8, 4, 5, 6, 7, 8, 9, 10)
    VLM_WGMMA(16, 8, 9, 10, 11, 12, 13, 14)
    VLM_WGMMA(24, 12, 13, 14, 15, 16, 17, 18)
    VLM_WGMMA(32, 16, 17, 18, 19, 20, 21, 22)
    VLM_WGMMA(40, 20, 21, 22, 23, 24, 25, 26)
    VLM_WGMMA(48, 24, 25, 26, 27, 28, 29, 30)
    VLM_WGMMA(56, 28, 29, 30, 31, 32, 33, 34)
    VLM_WGMMA(64, 32, 33, 34, 35, 36, 37, 38)
    VLM_WGMMA(72, 36, 37, 38, 39, 40, 41, 42)
    VLM_WGMMA(80, 40, 41, 42, 43, 44, 45, 46)
    VLM_WGMMA(88, 44, 45, 46, 47, 48, 49, 50)
    VLM_WGMMA(96, 48, 49, 50, 51, 52, 53, 54)
    VLM_WGMMA(104, 52, 53, 54, 55, 56, 57, 58)
    VLM_WGMMA(112, 56, 57, 58, 59, 60, 61, 62)
    VLM_WGMMA(120, 60, 61, 62, 63, 64, 65, 66)
    VLM_WGMMA(128, 64, 65, 66, 67, 68, 69, 70)
    VLM_WGMMA(136, 68, 69, 70, 71, 72, 73, 74)
    VLM_WGMMA(144, 72, 73, 74, 75, 76, 77, 78)
    VLM_WGMMA(152, 76, 77, 78, 79, 80, 81, 82)
    VLM_WGMMA(160, 80, 81, 82, 83, 84, 85, 86)
    VLM_WGMMA(168, 84, 85, 86, 87, 88, 89, 90)
    VLM_WGMMA(176, 88, 89, 90, 91, 92, 93, 94)
    VLM_WGMMA(184, 92, 93, 94, 95, 96, 97, 98)
    VLM_WGMMA(192, 96, 97, 98, 99, 100, 101, 102)
    VLM_WGMMA(200, 100, 101, 102, 103, 104, 105, 106)
    VLM_WGMMA(208, 104, 105, 106, 107, 108, 109, 110)
    VLM_WGMMA(216, 108, 109, 110, 111, 112, 113, 114)
    VLM_WGMMA(224, 112, 113, 114, 115, 116, 117, 118)
    VLM_WGMMA(232, 116, 117, 118, 119, 120, 121, 122)
    VLM_WGMMA(240, 120, 121, 122, 123, 124, 125, 126)
    VLM_WGMMA(248, 124, 125, 126, 127, 128, 129, 130)
    VLM_WGMMA(256, 128, 129, 130, 131, 132, 133, 134)
}

#undef VLM_WGMMA
#undef VLM_RS
#undef VLM_SS

}  // namespace vlmkernels
