// Which copy of a CPU kernel runs: each <room>_cpu.cpp is compiled once per instruction set
// (cmake/cpu.cmake) and instantiates its entry points for the tag VLMKERNELS_ISA.
// In those files everything but the entry points lives in an unnamed namespace, so that the linker
// cannot merge code of different instruction sets.
#pragma once

namespace vlmkernels {

struct Baseline {
    static constexpr const char* kName = "baseline";
};
struct Avx2 {
    static constexpr const char* kName = "avx2";
};
struct Avx512 {
    static constexpr const char* kName = "avx512";
};

// The best instruction set of this machine: 0 baseline, 1 avx2, 2 avx512, 3 amx (avx512 with tiles
// of bfloat16, for the few kernels that ask). The environment variable VLMKERNELS_ISA (one of these
// names, read once) caps it; another value is an invalid_argument.
int isa_level();

// Calls f.template operator()<Isa>() with the tag of isa_level().
template <class F>
auto dispatch_isa(F&& f) {
#if defined(__x86_64__)
    const int level = isa_level();
    if (level >= 2) return f.template operator()<Avx512>();
    if (level == 1) return f.template operator()<Avx2>();
#endif
    return f.template operator()<Baseline>();
}

}  // namespace vlmkernels
