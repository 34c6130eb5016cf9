#include "common/isa.h"

#include <algorithm>
#include <cstdlib>
#include <iterator>
#include <stdexcept>
#include <string>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace vlmkernels {

#if defined(__x86_64__) && defined(__linux__)
// AMX tiles of bfloat16, which a process must ask the kernel for.
static bool has_amx() {
    unsigned eax, ebx, ecx, edx;
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
    const bool amx_bf16 = edx >> 22 & 1, amx_tile = edx >> 24 & 1;
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    return amx_bf16 && amx_tile && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#else
static bool has_amx() { return false; }
#endif

static int machine_level() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        return has_amx() ? 3 : 2;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("f16c"))
        return 1;
#endif
    return 0;
}

static int capped_level() {
    const char* cap = std::getenv("VLMKERNELS_ISA");
    if (!cap || !*cap) return machine_level();
    const std::string names[] = {Baseline::kName, Avx2::kName, Avx512::kName, "amx"};
    const auto* name = std::find(std::begin(names), std::end(names), cap);
    if (name == std::end(names))
        throw std::invalid_argument(
            "the environment variable VLMKERNELS_ISA must be baseline, avx2, avx512 or amx, got " +
            std::string(cap));
    return std::min(machine_level(), int(name - names));
}

int isa_level() {
    static const int level = capped_level();
    return level;
}

}  // namespace vlmkernels
