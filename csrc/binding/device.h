// Where an op runs: on the GPU of its tensors, on the CPU, or (in the emulated module) as CUDA
// kernels on CPU tensors.
#pragma once

#include <pybind11/pybind11.h>

#include "binding/tensor.h"
#include "common/launch.h"

namespace vlmkernels {

// True when tensors on t's device go to CUDA kernels.
bool takes_cuda(const Tensor& t);

// Makes a GPU the calling thread's own, and the one before again at the end.
class CurrentDevice {
  public:
    Error set(int device);
    ~CurrentDevice();

  private:
    int previous_ = -1;
};

// Calls launch(stream) on t's device and current stream; a CUDA error becomes RuntimeError with the
// op's name.
class CudaScope {
  public:
    explicit CudaScope(const Tensor& t);
    Stream stream() const { return stream_; }
    void finish(Error error);

  private:
    const Tensor& tensor_;
    CurrentDevice device_;
    Stream stream_ = nullptr;
};

// Runs an op: `cuda(stream)` returns a cudaError_t, `cpu()` nothing; pass nullptr where there is no
// such kernel. Returns false when this build has no kernel for t's device: the caller then takes
// the PyTorch reference.
template <class Cuda, class Cpu>
bool run(const Tensor& t, Cuda&& cuda, Cpu&& cpu) {
    constexpr bool has_cuda = !std::is_same_v<std::decay_t<Cuda>, std::nullptr_t>;
    constexpr bool has_cpu = !std::is_same_v<std::decay_t<Cpu>, std::nullptr_t>;
#ifdef VLMKERNELS_WITH_CUDA
    if constexpr (has_cuda) {
        if (takes_cuda(t)) {
            CudaScope scope(t);
            scope.finish(cuda(scope.stream()));
            return true;
        }
    }
#endif
    if constexpr (has_cpu) {
        if (t.device.type == dlpack::kCPU) {
            py::gil_scoped_release release;
            cpu();
            return true;
        }
    }
    return false;
}

// A room adds its functions to the module: static const Binding binding([](py::module_& m) {
// m.def(...); });
struct Binding {
    explicit Binding(void (*define)(py::module_&)) : define(define), next(first) { first = this; }
    void (*define)(py::module_&);
    Binding* next;
    inline static Binding* first = nullptr;
};

}  // namespace vlmkernels
