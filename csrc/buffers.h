// Tables that come from Python as buffers of 8-byte numbers (array.array, memoryview).
#pragma once
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>
#include <vector>

namespace layerfused {

template <class T>
std::vector<T> rows(const pybind11::buffer& buffer) {
  const pybind11::buffer_info info = buffer.request();
  const size_t bytes = size_t(info.size * info.itemsize);
  if (info.itemsize != 8 || bytes % sizeof(T)) throw std::invalid_argument("not a whole number of 8-byte rows");
  const T* data = static_cast<const T*>(info.ptr);
  return std::vector<T>(data, data + bytes / sizeof(T));
}

// Looked at in place: the buffer must outlive it.
template <class T>
const T* column(const pybind11::buffer& buffer, int64_t size, const char* name) {
  const pybind11::buffer_info info = buffer.request();
  if (info.itemsize != 8 || info.size != size)
    throw std::invalid_argument(std::string(name) + " needs " + std::to_string(size) + " numbers of 8 bytes, got " +
                                std::to_string(info.size));
  return static_cast<const T*>(info.ptr);
}

}  // namespace layerfused
