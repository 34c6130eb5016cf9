// What the current GPU can run.
#include <cuda_runtime.h>

#include <cstdlib>

#include "common/launch.h"

namespace vlmkernels {

__global__ void probe_kernel() {}

Error probe_kernels() {
    cudaFuncAttributes attributes;
    cudaError_t error = cudaFuncGetAttributes(&attributes, probe_kernel);
    cudaGetLastError();  // a missing image is an answer, not an error to leave behind
    return error;
}

// Code for sm_90a, which nothing else runs; a build without it would take the PTX of sm_80.
static bool find_hopper(int device) {
    int major = 0, minor = 0;
    cudaFuncAttributes attributes;
    const bool found =
        cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
        cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess &&
        cudaFuncGetAttributes(&attributes, probe_kernel) == cudaSuccess;
    if (!found) cudaGetLastError();
    return found && major == 9 && minor == 0 && attributes.ptxVersion == 90;
}

// 0: as the GPU is.
static int wanted_arch() {
    const char* arch = std::getenv("VLMKERNELS_ARCH");
    return arch ? std::atoi(arch) : 0;
}

static int attribute(cudaDeviceAttr which) {
    int device = 0, value = 1;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&value, which, device);
    return value;
}

int num_sms() { return attribute(cudaDevAttrMultiProcessorCount); }

int shared_bytes_per_cta() {
    return wanted_arch() == 86 ? 99 * 1024 : attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
}

bool has_hopper() {
    constexpr int kMaxDevices = 64;
    static signed char known[kMaxDevices] = {};  // 0: not asked yet
    if (wanted_arch() && wanted_arch() < 90) return false;
    int device = 0;
    if (cudaGetDevice(&device) != cudaSuccess || device >= kMaxDevices) return false;
    if (!known[device]) known[device] = find_hopper(device) ? 1 : -1;
    return known[device] > 0;
}

}  // namespace vlmkernels
