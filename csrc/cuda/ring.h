// What the host asks of CUDA's runtime: errors, the current device, and pinned memory that copies read from later.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

namespace layerfused::cuda {

inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // so that the next call does not find this error
  throw std::runtime_error(std::string("CUDA could not ") + what + ": " + cudaGetErrorName(status) + ", " +
                           cudaGetErrorString(status));
}

// Makes a device the current one, and the one before again when it goes.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    check(cudaGetDevice(&before_), "tell the current device");
    if (before_ != device) check(cudaSetDevice(device), "make the parameters' device the current one");
    changed_ = before_ != device;
  }
  ~OnDevice() {
    if (changed_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

// Pinned memory in turns: a piece is written again only when the copy that reads from it is done. One piece alone would
// be overwritten while an older copy is still queued.
class Ring {
 public:
  ~Ring() {
    for (Piece& piece : pieces_) {
      if (piece.done) cudaEventSynchronize(piece.done), cudaEventDestroy(piece.done);
      if (piece.memory) cudaFreeHost(piece.memory);
    }
  }

  // Copies from the host to the device when the stream comes to it.
  void copy(void* to, const void* from, size_t bytes, cudaStream_t stream) {
    Piece& piece = pieces_[next_];
    if (!piece.done) check(cudaEventCreateWithFlags(&piece.done, cudaEventDisableTiming), "make an event");
    check(cudaEventSynchronize(piece.done), "wait for an earlier copy");  // of PIECES copies ago: mostly long done
    if (piece.bytes < bytes) grow(piece, bytes);
    std::memcpy(piece.memory, from, bytes);
    check(cudaMemcpyAsync(to, piece.memory, bytes, cudaMemcpyHostToDevice, stream), "copy the tables to the device");
    check(cudaEventRecord(piece.done, stream), "record an event");
    next_ = (next_ + 1) % PIECES;
  }

  size_t bytes() const {
    size_t sum = 0;
    for (const Piece& piece : pieces_) sum += piece.bytes;
    return sum;
  }

 private:
  static constexpr int PIECES = 4;
  struct Piece {
    void* memory = nullptr;
    size_t bytes = 0;
    cudaEvent_t done = nullptr;
  };

  static void grow(Piece& piece, size_t bytes) {
    if (piece.memory) check(cudaFreeHost(piece.memory), "free pinned memory");
    piece.memory = nullptr, piece.bytes = 0;
    check(cudaHostAlloc(&piece.memory, bytes, cudaHostAllocDefault), "allocate pinned memory for the tables");
    piece.bytes = bytes;
  }

  Piece pieces_[PIECES];
  int next_ = 0;
};

}  // namespace layerfused::cuda
