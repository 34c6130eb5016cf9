#include "binding/device.h"

#ifdef VLMKERNELS_WITH_CUDA
#include <cuda_runtime_api.h>

#include <stdexcept>
#endif

namespace vlmkernels {

#ifdef VLMKERNELS_EMULATED

bool takes_cuda(const Tensor&) { return true; }

#elif defined(VLMKERNELS_WITH_CUDA)

// Asked once per GPU; one without code in this build takes the PyTorch references, with a warning.
static bool has_kernels(int device) {
    constexpr int kMaxDevices = 64;
    static signed char known[kMaxDevices] = {};  // 0: not asked yet
    if (device >= kMaxDevices) return false;
    if (!known[device]) {
        int previous = 0;
        cudaGetDevice(&previous);
        cudaSetDevice(device);
        const Error error = probe_kernels();
        cudaSetDevice(previous);
        const bool no_code = error == cudaErrorNoKernelImageForDevice ||
                             error == cudaErrorInvalidDeviceFunction ||
                             error == cudaErrorInsufficientDriver;
        if (error != cudaSuccess && !no_code)  // of the moment: not to be remembered
            throw std::runtime_error(std::string("vlmkernels: ") +
                                     cudaGetErrorString(static_cast<cudaError_t>(error)));
        known[device] = no_code ? -1 : 1;
        if (no_code &&
            PyErr_WarnEx(PyExc_RuntimeWarning,
                         "vlmkernels: this build has no CUDA code for this GPU, or wants a "
                         "newer driver; its ops run as plain PyTorch (see `vlmkernels info`)",
                         1))
            throw py::error_already_set();
    }
    return known[device] > 0;
}

bool takes_cuda(const Tensor& t) {
    return t.device.type == dlpack::kCUDA && has_kernels(t.device.id);
}

#else

bool takes_cuda(const Tensor&) { return false; }

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
