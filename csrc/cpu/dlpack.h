// The part of DLPack 1's binary interface that csrc/cpu/tensors.cpp reads: what a Python tensor is, without its library.
// Layout as in https://github.com/dmlc/dlpack, include/dlpack/dlpack.h, whose names are kept.
#pragma once

#include <stdint.h>

namespace feather {
namespace dlpack {

constexpr uint32_t kMajorVersion = 1;
constexpr int32_t kDLCPU = 1;
constexpr uint8_t kDLFloat = 2;
constexpr uint8_t kDLBfloat = 4;

struct DLDevice {
  int32_t device_type;
  int32_t device_id;
};

struct DLDataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};

struct DLTensor {
  void* data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements; null only without dimensions
  uint64_t byte_offset;
};

struct DLPackExchangeAPIHeader {
  uint32_t major;
  uint32_t minor;
  const DLPackExchangeAPIHeader* prev_api;  // of an older major version
};

// In the capsule of this name at the tensor type's attribute __dlpack_c_exchange_api__.
constexpr char kCapsule[] = "dlpack_exchange_api";

struct DLPackExchangeAPI {
  DLPackExchangeAPIHeader header;
  void* managed_tensor_allocator;
  void* managed_tensor_from_py_object_no_sync;
  void* managed_tensor_to_py_object_no_sync;
  // 0, or -1 with a Python exception set; shape and strides stay the tensor's. Null: not offered.
  int (*dltensor_from_py_object_no_sync)(void* py_object, DLTensor* out);
  void* current_work_stream;
};

}  // namespace dlpack
}  // namespace feather
