#include "binding/tensor.h"

#include "binding/check.h"

namespace vlmkernels {

static PyTypeObject* tensor_type = nullptr;
static PyTypeObject* parameter_type = nullptr;
static dlpack::ExchangeApi* api = nullptr;

void register_tensor_types(py::handle tensor, py::handle parameter) {
    py::object capsule = tensor.attr("__dlpack_c_exchange_api__");
    api = static_cast<dlpack::ExchangeApi*>(
        PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    if (!api) throw py::error_already_set();
    if (api->version_major != 1 || !api->tensor_from_py_object)
        throw std::runtime_error(
            "vlmkernels: this torch has an unknown DLPack exchange API; torch >= 2.10 is needed");
    tensor_type = reinterpret_cast<PyTypeObject*>(tensor.ptr());
    parameter_type = reinterpret_cast<PyTypeObject*>(parameter.ptr());
}

const dlpack::ExchangeApi& exchange_api() { return *api; }

static DType dtype_of(dlpack::DataType type) {
    if (type.lanes != 1) return DType::kOther;
    switch (type.code * 256 + type.bits) {
        case dlpack::kFloat * 256 + 64: return DType::kFloat64;
        case dlpack::kFloat * 256 + 32: return DType::kFloat32;
        case dlpack::kFloat * 256 + 16: return DType::kFloat16;
        case dlpack::kBfloat * 256 + 16: return DType::kBFloat16;
        case dlpack::kInt * 256 + 64: return DType::kInt64;
        case dlpack::kInt * 256 + 32: return DType::kInt32;
        case dlpack::kUInt * 256 + 8: return DType::kUInt8;
        case dlpack::kBool * 256 + 8: return DType::kBool;
        default: return DType::kOther;
    }
}

Tensor::Tensor(const char* op, const char* name, py::handle object, bool optional)
    : op(op), name(name) {
    if (optional && object.is_none()) return;
    PyTypeObject* type = Py_TYPE(object.ptr());
    if (type != tensor_type && type != parameter_type)
        type_error(*this, "must be a plain torch.Tensor", type->tp_name);
    dlpack::Tensor view;
    if (api->tensor_from_py_object(object.ptr(), &view)) throw py::error_already_set();
    data = static_cast<char*>(view.data) + view.byte_offset;
    dtype = dtype_of(view.dtype);
    device = view.device;
    ndim = view.ndim;
    sizes = view.shape;
    strides = view.strides;
    given = true;
    if (!data && numel()) type_error(*this, "must have memory", "a tensor without storage");
    if (device.type != dlpack::kCPU && device.type != dlpack::kCUDA)
        type_error(*this, "must be on the CPU or on a CUDA device", device_text(*this));
}

int64_t Tensor::numel() const {
    int64_t n = 1;
    for (int i = 0; i < ndim; ++i) n *= sizes[i];
    return n;
}

void Tensor::wrong_rank(const char* words) const {
    value_error(*this, std::string("must have shape ") + words, shape_text(*this));
}

std::string shape_text(const Tensor& t) {
    std::string text = "(";
    for (int i = 0; i < t.ndim; ++i) text += (i ? ", " : "") + std::to_string(t.sizes[i]);
    return text + (t.ndim == 1 ? ",)" : ")");
}

const char* dtype_text(DType dtype) {
    switch (dtype) {
        case DType::kFloat64: return "float64";
        case DType::kFloat32: return "float32";
        case DType::kFloat16: return "float16";
        case DType::kBFloat16: return "bfloat16";
        case DType::kInt64: return "int64";
        case DType::kInt32: return "int32";
        case DType::kUInt8: return "uint8";
        case DType::kBool: return "bool";
        default: return "another dtype";
    }
}

std::string device_text(const Tensor& t) {
    if (t.device.type == dlpack::kCPU) return "cpu";
    if (t.device.type == dlpack::kCUDA) return "cuda:" + std::to_string(t.device.id);
    return "device type " + std::to_string(t.device.type);
}

}  // namespace vlmkernels
