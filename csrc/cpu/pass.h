// A sweep's way over a chunk: which memory it sees, stride by stride.
#pragma once
#include "cpu/kernels.h"
#include "cpu/storage.h"
#include "plan.h"

namespace layerfused {

// Addresses of one operand of all tensors, and their storage types. An address of 0 is an operand that is not there.
struct Column {
  const int64_t *address = nullptr, *storage = nullptr;
};

// A sweep over a chunk, stride by stride: fp32 operands in place, others through a buffer, those not read as zeros.
class Pass {
 public:
  void begin(const Column* const (&columns)[4], const Chunk&, Sweep operands);
  int64_t left() const { return left_; }
  Stretch open(int64_t most);
  void close();

 private:
  struct Window {
    char* at = nullptr;
    int64_t storage = FP32;
    bool read = false, written = false;
  };
  Window windows_[4];
  int64_t left_ = 0, open_ = 0;
  alignas(64) float buffers_[4][TILE];
};

}  // namespace layerfused
