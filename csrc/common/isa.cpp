#include "common/isa.h"

#include <algorithm>
#include <cstdlib>
#include <iterator>
#include <stdexcept>
#include <string>

namespace vlmkernels {

static int machine_level() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        return 2;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("f16c"))
        return 1;
#endif
    return 0;
}

static int capped_level() {
    const char* cap = std::getenv("VLMKERNELS_ISA");
    if (!cap || !*cap) return machine_level();
    const std::string names[] = {Baseline::kName, Avx2::kName, Avx512::kName};
    const auto* name = std::find(std::begin(names), std::end(names), cap);
    if (name == std::end(names))
        throw std::invalid_argument(
            "the environment variable VLMKERNELS_ISA must be baseline, avx2 or avx512, got " +
            std::string(cap));
    return std::min(machine_level(), int(name - names));
}

int isa_level() {
    static const int level = capped_level();
    return level;
}

}  // namespace vlmkernels
