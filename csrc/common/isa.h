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

// Calls f.template operator()<Isa>() with the best instruction set of this machine.
template <class F>
auto dispatch_isa(F&& f) {
#if defined(__x86_64__)
    static const int level = [] {
        __builtin_cpu_init();
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
            return 2;
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? 1 : 0;
    }();
    if (level == 2) return f.template operator()<Avx512>();
    if (level == 1) return f.template operator()<Avx2>();
#endif
    return f.template operator()<Baseline>();
}

}  // namespace vlmkernels
