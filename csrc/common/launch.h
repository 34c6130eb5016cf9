// What a launch declaration needs, free of CUDA headers so that a CPU-only build compiles it.
#pragma once

struct CUstream_st;

namespace vlmkernels {

using Stream = CUstream_st*;  // cudaStream_t
using Error = int;            // cudaError_t; 0 is success

// Success when this build holds code for the current GPU.
Error probe_kernels();
// True when the current GPU runs this build's kernels for sm_90a (hopper.cuh). The environment
// variable VLMKERNELS_ARCH=80 says no: so both paths are tested on one machine.
bool has_hopper();
// Of the current GPU: multiprocessors, and the shared memory that one CTA can have: 163 KB on
// sm_80, 227 on sm_90, 99 on sm_86, sm_89 and sm_120 (and with VLMKERNELS_ARCH=86).
int num_sms();
int shared_bytes_per_cta();

}  // namespace vlmkernels
