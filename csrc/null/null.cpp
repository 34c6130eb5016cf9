#include "null/null.h"

#include "binding/check.h"
#include "binding/device.h"
#include "common/isa.h"

namespace vlmkernels {

static bool null(py::handle x_, py::handle y_) {
    Tensor x("null", "x", x_), y("null", "y", y_);
    expect_dtype(x, kFloats);
    expect_contiguous(x);
    expect_same_shape(y, x);
    expect_same_dtype(y, x);
    expect_same_device(y, x);
    expect_contiguous(y);
    NullParams p{.x = x.data, .y = y.data, .num_bytes = x.numel() * size_of(x.dtype)};
    return run(
        x, [&](Stream stream) { return launch_null(p, stream); },
        [&] { dispatch_isa([&]<class Isa>() { null_cpu<Isa>(p); }); });
}

static const Binding binding([](py::module_& m) { m.def("null", &null); });

}  // namespace vlmkernels
