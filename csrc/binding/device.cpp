#include "binding/device.h"

#ifdef VLMKERNELS_WITH_CUDA
#include <cuda.h>  // types only
#include <cuda_runtime_api.h>

#include <stdexcept>
#endif

namespace vlmkernels {

#ifdef VLMKERNELS_WITH_CUDA

using ContextState = CUresult (*)(CUdevice, unsigned*, int*);

// From the driver that is there, so that the library loads where there is none.
static ContextState find_context_state() {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
    const cudaError_t error = cudaGetDriverEntryPointByVersion(
        "cuDevicePrimaryCtxGetState", &function, 12000, cudaEnableDefault, &result);
    return error == cudaSuccess && result == cudaDriverEntryPointSuccess
               ? reinterpret_cast<ContextState>(function)
               : nullptr;
}

static bool has_context(int device) {
    static const ContextState state = find_context_state();
    unsigned flags = 0;
    int active = 0;
    return state && state(device, &flags, &active) == CUDA_SUCCESS && active;
}

Error CurrentDevice::set(int device) {
    int current = -1;
    if (const cudaError_t error = cudaGetDevice(&current)) return error;
    if (current != device) previous_ = current;
    // Also where it is current: a new thread has no context until then, and tensor maps want one.
    return cudaSetDevice(device);
}

// As in torch, a GPU that nobody used is not given a context, which takes memory.
CurrentDevice::~CurrentDevice() {
    if (previous_ >= 0 && has_context(previous_)) cudaSetDevice(previous_);
}

CudaScope::CudaScope(const Tensor& t) : tensor_(t) {
    if (t.device.type != dlpack::kCUDA) return;
    finish(device_.set(t.device.id));
    void* stream = nullptr;
    if (exchange_api().current_work_stream(t.device.type, t.device.id, &stream))
        throw py::error_already_set();
    stream_ = static_cast<Stream>(stream);
}

void CudaScope::finish(Error error) {
#ifdef VLMKERNELS_EMULATED
    if (error == cudaSuccess) {
        py::gil_scoped_release release;
        error = cudaDeviceSynchronize();
    }
#endif
    if (error == cudaSuccess) return;
    cudaGetLastError();  // told here; not to be met again by whoever asks next
    throw std::runtime_error(std::string(tensor_.op) + ": " +
                             cudaGetErrorString(static_cast<cudaError_t>(error)));
}

#endif

#ifdef VLMKERNELS_EMULATED

bool takes_cuda(const Tensor&) { return true; }

#elif defined(VLMKERNELS_WITH_CUDA)

static bool says_no_code(Error error) {
    for (Error code : {cudaErrorNoKernelImageForDevice, cudaErrorInvalidDeviceFunction,
                       cudaErrorInsufficientDriver, cudaErrorUnsupportedPtxVersion,
                       cudaErrorJitCompilerNotFound, cudaErrorJitCompilationDisabled})
        if (error == code) return true;
    return false;
}

// Asked once per GPU; one without code in this build takes the PyTorch references, with a warning.
static bool has_kernels(int device) {
    constexpr int kMaxDevices = 64;
    static signed char known[kMaxDevices] = {};  // 0: not asked yet
    if (device >= kMaxDevices) return false;
    if (!known[device]) {
        CurrentDevice current;
        Error error = current.set(device);
        if (error == cudaSuccess) error = probe_kernels();
        const bool no_code = says_no_code(error);
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

}  // namespace vlmkernels
