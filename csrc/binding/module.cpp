// The Python module: what was built, and the functions of every room.
#include <pybind11/pybind11.h>

#include "binding/device.h"
#include "binding/tensor.h"
#include "common/isa.h"

#ifdef VLMKERNELS_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

namespace vlmkernels {

static py::dict build_info() {
    py::dict info;
#ifdef VLMKERNELS_WITH_CUDA
    info["cuda"] = CUDART_VERSION / 1000 * 100 + CUDART_VERSION % 1000 / 10;  // 1300: 13.0
#else
    info["cuda"] = 0;
#endif
    info["cuda_archs"] = VLMKERNELS_CUDA_ARCHS;
    info["compilers"] = VLMKERNELS_COMPILERS;
    info["cpu"] = dispatch_isa([]<class Isa>() { return Isa::kName; });
#ifdef VLMKERNELS_EMULATED
    info["emulated"] = true;
#else
    info["emulated"] = false;
#endif
    return info;
}

// Whether tensors on this tensor's device go to CUDA kernels.
static bool has_cuda_kernels_for(py::handle tensor) {
#ifdef VLMKERNELS_WITH_CUDA
    return takes_cuda(Tensor("takes_cuda", "tensor", tensor));
#else
    return false;
#endif
}

static void define(py::module_& m) {
    isa_level();  // a wrong VLMKERNELS_ISA fails the import
    m.def("register_tensor_types", &register_tensor_types);
    m.def("build_info", &build_info);
    m.def("takes_cuda", &has_cuda_kernels_for);
    for (Binding* binding = Binding::first; binding; binding = binding->next) binding->define(m);
}

}  // namespace vlmkernels

PYBIND11_MODULE(VLMKERNELS_MODULE, m) { vlmkernels::define(m); }
