// The part of the DLPack C exchange table (version 1.x) that looks at a tensor without owning it.
#pragma once
#include <cstdint>

namespace layerfused::dlpack {

struct Tensor {
  void* data;
  struct { int32_t type, id; } device;
  int32_t dimensions;
  struct { uint8_t code, bits; uint16_t lanes; } type;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};
constexpr int CPU = 1, FLOAT = 2, BFLOAT = 4;

struct Exchange {
  struct { uint32_t major, minor; } version;
  const Exchange* previous;
  void* allocate;
  void* managed_from_object;
  void* object_from_managed;
  int (*look)(void* object, Tensor* out);  // 0, or -1 with a Python exception set
  void* current_stream;
};

}  // namespace layerfused::dlpack
