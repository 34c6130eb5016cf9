#include "vq_lookup/vq_lookup.h"

#include <vector>

#include "binding/check.h"
#include "binding/device.h"
#include "common/isa.h"

namespace vlmkernels {

static constexpr int64_t kLeastDim = 1, kMostDim = kVqMostDim, kMostCodes = 1 << 20;

static bool is_cosine(const char* op, const std::string& metric) {
    if (metric != "euclidean" && metric != "cosine")
        value_error(op, "metric must be 'euclidean' or 'cosine', got '" + metric + "'");
    return metric == "cosine";
}

static bool vq_lookup(py::handle z_, py::handle codebook_, const std::string& metric,
                      py::handle indices_, py::handle quantized_, py::handle distance_,
                      py::handle workspace_) {
    const char* op = "vq_lookup";
    Tensor z(op, "z", z_), codebook(op, "codebook", codebook_), indices(op, "indices", indices_),
        quantized(op, "quantized", quantized_), distance(op, "distance", distance_),
        workspace(op, "workspace", workspace_, true);
    const bool cosine = is_cosine(op, metric);
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
                     .cosine = cosine,
                     .dtype = z.dtype};
    return run(
        z, [&](Stream stream) { return launch_vq_lookup(p, stream); },
        [&] { dispatch_isa([&]<class Isa>() { vq_lookup_cpu<Isa>(p); }); });
}

// The tokens of each code, in order, as VqBackwardParams has them.
struct ByCode {
    std::vector<int64_t> starts, order;

    ByCode(const Tensor& indices, int64_t num_codes)
        : starts(num_codes + 2), order(indices.numel()) {
        const auto* codes = indices.ptr<int64_t>();
        for (size_t i = 0; i < order.size(); ++i) {
            if (codes[i] < 0 || codes[i] >= num_codes)
                value_error(indices, "must be from 0 to num_codes - 1", std::to_string(codes[i]));
            ++starts[codes[i] + 2];
        }
        for (int64_t c = 2; c <= num_codes; ++c) starts[c] += starts[c - 1];
        for (size_t i = 0; i < order.size(); ++i) order[starts[codes[i] + 1]++] = int64_t(i);
    }
};

// False where there is no kernel.
static bool vq_lookup_backward(py::handle z_, py::handle codes_, py::handle indices_,
                               py::handle to_z_, py::handle to_code_, py::handle ddistance_,
                               py::handle dcodebook_distance_, int64_t num_codes,
                               const std::string& metric, py::handle dz_, py::handle dcodebook_) {
    const char* op = "vq_lookup_backward";
    Tensor z(op, "z", z_), codes(op, "codes", codes_), indices(op, "indices", indices_),
        to_z(op, "to_z", to_z_, true), to_code(op, "to_code", to_code_, true),
        ddistance(op, "ddistance", ddistance_, true),
        dcodebook_distance(op, "dcodebook_distance", dcodebook_distance_, true),
        dz(op, "dz", dz_, true), dcodebook(op, "dcodebook", dcodebook_, true);
    const bool cosine = is_cosine(op, metric);
    expect_dtype(z, kFloats);
    const auto [num_tokens, dim] = z.unpack<2>("(num_tokens, dim)");
    expect_dtype(indices, {DType::kInt64});
    expect_shape(indices, {num_tokens}, "(num_tokens,)");
    if (dcodebook.given) expect_shape(dcodebook, {num_codes, dim}, "(num_codes, dim)");
    for (const Tensor* rows : {&codes, &to_z, &to_code, &dz})
        if (rows->given) expect_same_shape(*rows, z);
    for (const Tensor* same : {&codes, &to_z, &to_code, &dz, &dcodebook})
        if (same->given) expect_same_dtype(*same, z);
    const DType distances = z.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
    for (const Tensor* distance : {&ddistance, &dcodebook_distance}) {
        if (!distance->given) continue;
        expect_shape(*distance, {num_tokens}, "(num_tokens,)");
        expect_dtype(*distance, {distances});
    }
    for (const Tensor* t : {&z, &codes, &indices, &to_z, &to_code, &ddistance, &dcodebook_distance,
                            &dz, &dcodebook}) {
        if (!t->given) continue;
        expect_same_device(*t, z);
        expect_contiguous(*t);
    }
    if (z.dtype == DType::kFloat64 || dim > kMostDim || z.device.type != dlpack::kCPU) return false;
    const ByCode by_code(indices, num_codes);
    VqBackwardParams p{z.data,
                       codes.data,
                       by_code.starts.data(),
                       by_code.order.data(),
                       to_z.data,
                       to_code.data,
                       ddistance.ptr<float>(),
                       dcodebook_distance.ptr<float>(),
                       dz.data,
                       dcodebook.data,
                       num_tokens,
                       int(num_codes),
                       int(dim),
                       cosine,
                       z.dtype};
    return run(z, nullptr,
               [&] { dispatch_isa([&]<class Isa>() { vq_lookup_backward_cpu<Isa>(p); }); });
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
    m.def("vq_lookup_backward", &vq_lookup_backward);
    m.def("vq_lookup_workspace", &vq_lookup_workspace_for);
});

}  // namespace vlmkernels
