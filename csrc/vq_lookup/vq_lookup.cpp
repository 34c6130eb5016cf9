#include "vq_lookup/vq_lookup.h"

#include "binding/check.h"
#include "binding/device.h"
#include "common/isa.h"

namespace vlmkernels {

static constexpr int64_t kLeastDim = 1, kMostDim = 1024, kMostCodes = 1 << 20;

static bool vq_lookup(py::handle z_, py::handle codebook_, const std::string& metric,
                      py::handle indices_, py::handle quantized_, py::handle distance_,
                      py::handle workspace_) {
    const char* op = "vq_lookup";
    Tensor z(op, "z", z_), codebook(op, "codebook", codebook_), indices(op, "indices", indices_),
        quantized(op, "quantized", quantized_), distance(op, "distance", distance_),
        workspace(op, "workspace", workspace_, true);
    if (metric != "euclidean" && metric != "cosine")
        value_error(op, "metric must be 'euclidean' or 'cosine', got '" + metric + "'");
    expect_dtype(z, kFloats);
    const auto [num_codes, dim] = codebook.unpack<2>("(num_codes, dim)");
    expect_same_dtype(codebook, z);
    expect_same_device(codebook, z);
    if (num_codes < 1 || num_codes > kMostCodes)
        value_error(codebook, "must have 1 to " + std::to_string(kMostCodes) + " codes",
                    shape_text(codebook));
    if (dim < kLeastDim || dim > kMostDim)
        value_error(
            codebook,
            "must have dim from " + std::to_string(kLeastDim) + " to " + std::to_string(kMostDim),
            shape_text(codebook));
    const int64_t num_tokens = z.unpack<2>("(num_tokens, dim)")[0];
    expect_shape(z, {num_tokens, dim}, "(num_tokens, dim)");
    expect_contiguous(z);
    expect_contiguous(codebook);
    expect_shape(indices, {num_tokens}, "(num_tokens,)");
    expect_dtype(indices, {DType::kInt64});
    expect_same_shape(quantized, z);
    expect_same_dtype(quantized, z);
    expect_shape(distance, {num_tokens}, "(num_tokens,)");
    expect_dtype(distance, {z.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32});
    for (const Tensor* out : {&indices, &quantized, &distance}) {
        expect_same_device(*out, z);
        expect_contiguous(*out);
    }
    if (z.dtype == DType::kFloat64) return false;
    const bool on_cuda = takes_cuda(z);
    if (on_cuda && num_tokens) {
        if (!workspace.given) value_error(op, "workspace must be given for CUDA kernels");
        expect_dtype(workspace, {DType::kUInt8});
        expect_same_device(workspace, z);
        expect_aligned(workspace);
#ifdef VLMKERNELS_WITH_CUDA
        expect_shape(workspace, {vq_lookup_workspace(int(num_codes), int(dim))}, "(bytes,)");
#endif
    }
    VqLookupParams p{.z = z.data,
                     .codebook = codebook.data,
                     .indices = indices.ptr<int64_t>(),
                     .quantized = quantized.data,
                     .distance = distance.ptr<float>(),
                     .workspace = workspace.data,
                     .num_tokens = num_tokens,
                     .num_codes = int(num_codes),
                     .dim = int(dim),
                     .cosine = metric == "cosine",
                     .dtype = z.dtype};
    return run(
        z, [&](Stream stream) { return launch_vq_lookup(p, stream); },
        [&] { dispatch_isa([&]<class Isa>() { vq_lookup_cpu<Isa>(p); }); });
}

// Bytes of `workspace` for a codebook on this tensor's device; 0 where no kernel wants one.
static int64_t vq_lookup_workspace_for(py::handle codebook_) {
    Tensor codebook("vq_lookup", "codebook", codebook_);
    const auto [num_codes, dim] = codebook.unpack<2>("(num_codes, dim)");
    const bool in_range =
        num_codes >= 1 && num_codes <= kMostCodes && dim >= kLeastDim && dim <= kMostDim;
#ifdef VLMKERNELS_WITH_CUDA
    if (in_range && takes_cuda(codebook)) return vq_lookup_workspace(int(num_codes), int(dim));
#endif
    return 0;
}

static const Binding binding([](py::module_& m) {
    m.def("vq_lookup", &vq_lookup);
    m.def("vq_lookup_workspace", &vq_lookup_workspace_for);
});

}  // namespace vlmkernels
