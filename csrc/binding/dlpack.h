// The part of DLPack 1.3 that the binding reads: a tensor view and the C exchange API, a table of C
// functions that torch >= 2.10 hangs on its tensor type. (github.com/dmlc/dlpack, Apache-2.0)
#pragma once

#include <cstdint>

namespace vlmkernels::dlpack {

enum DeviceType : int32_t { kCPU = 1, kCUDA = 2 };
enum TypeCode : uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4, kBool = 6 };

struct Device {
    int32_t type;
    int32_t id;
};
struct DataType {
    uint8_t code;
    uint8_t bits;
    uint16_t lanes;
};
struct Tensor {
    void* data;
    Device device;
    int32_t ndim;
    DataType dtype;
    int64_t* shape;
    int64_t* strides;
    uint64_t byte_offset;
};
struct ExchangeApi {
    uint32_t version_major, version_minor;
    void* previous;
    void* managed_tensor_allocator;
    void* managed_tensor_from_py_object;
    void* managed_tensor_to_py_object;
    int (*tensor_from_py_object)(void* object, Tensor* out);  // a view: owns nothing
    int (*current_work_stream)(int32_t device_type, int32_t device_id, void** out);
};

}  // namespace vlmkernels::dlpack
