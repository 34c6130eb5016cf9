#include "binding/device.h"

#ifdef VLMKERNELS_WITH_CUDA
#include <cuda_runtime_api.h>

#include <stdexcept>
#endif

namespace vlmkernels {

#ifdef VLMKERNELS_EMULATED
bool takes_cuda(const Tensor&) { return true; }
#else
bool takes_cuda(const Tensor& t) { return t.device.type == dlpack::kCUDA; }
#endif

#ifdef VLMKERNELS_WITH_CUDA

CudaScope::CudaScope(const Tensor& t) : tensor_(t) {
    if (t.device.type != dlpack::kCUDA) return;
    int current = 0;
    finish(cudaGetDevice(&current));
    if (current != t.device.id) {
        finish(cudaSetDevice(t.device.id));
        previous_device_ = current;
    }
    void* stream = nullptr;
    if (exchange_api().current_work_stream(t.device.type, t.device.id, &stream))
        throw py::error_already_set();
    stream_ = static_cast<Stream>(stream);
}

CudaScope::~CudaScope() {
    if (previous_device_ >= 0) cudaSetDevice(previous_device_);
}

void CudaScope::finish(Error error) {
#ifdef VLMKERNELS_EMULATED
    if (error == cudaSuccess) {
        py::gil_scoped_release release;
        error = cudaDeviceSynchronize();
    }
#endif
    if (error != cudaSuccess)
        throw std::runtime_error(std::string(tensor_.op) + ": " +
                                 cudaGetErrorString(static_cast<cudaError_t>(error)));
}

#endif

}  // namespace vlmkernels
