// null: y = x. The room to copy when adding an op; its speed is the memory ceiling of the others.
//   null.h        what the kernel is given, and the launch declarations
//   null.cu       CUDA kernel and launcher
//   null_cpu.cpp  CPU kernel, compiled once per instruction set
//   null.cpp      argument checks and binding
#pragma once

#include <cstdint>

#include "common/launch.h"

namespace vlmkernels {

struct NullParams {
    const void* x;  // [num_bytes]
    void* y;        // [num_bytes]
    int64_t num_bytes;
};

Error launch_null(const NullParams& p, Stream stream);

template <class Isa>
void null_cpu(const NullParams& p);

}  // namespace vlmkernels
