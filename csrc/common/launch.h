// What a launch declaration needs, free of CUDA headers so that a CPU-only build compiles it.
#pragma once

struct CUstream_st;

namespace vlmkernels {

using Stream = CUstream_st*;  // cudaStream_t
using Error = int;            // cudaError_t; 0 is success

// Success when this build holds code for the current GPU (probe.cu).
Error probe_kernels();

}  // namespace vlmkernels
