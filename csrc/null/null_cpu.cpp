#include "common/cpu.h"
#include "null/null.h"

namespace vlmkernels {

template <class Isa>
void null_cpu(const NullParams& p) {
    parallel_for(p.num_bytes, 1 << 18, [&](int64_t begin, int64_t end) {
        std::memcpy(static_cast<char*>(p.y) + begin, static_cast<const char*>(p.x) + begin,
                    end - begin);
    });
}

template void null_cpu<VLMKERNELS_ISA>(const NullParams& p);

}  // namespace vlmkernels
