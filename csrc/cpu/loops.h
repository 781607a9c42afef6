// The loops over elements that are no rule's.
#pragma once
#include <cstdint>

#include "cpu/kernels.h"
#include "philox.h"

namespace layerfused {

void to_float(float* to, const void* from, int64_t storage, int64_t n);
void from_float(void* to, const float* from, int64_t storage, int64_t n);

// Of the ways REMAINDER and KAHAN (see storage.h).
void join(float* to, const void* from, const void* rest, int64_t storage, int64_t n);
void split(void* to, void* rest, const float* from, int64_t storage, int64_t n);

// What the noise of one operand in one step is drawn by.
struct Noise {
  int64_t seed, place;
  Stream stream;
  uint32_t t;
};

// At most TILE elements by the way STOCHASTIC, of which the first is the tensor's element number `start`.
void from_float_stochastic(void* to, const float* from, int64_t storage, const Noise&, int64_t start, int64_t n);

// What is left of x when it has been stored in 16 bits.
void round_as_stored(float* x, int64_t storage, int64_t n);

// Adds x[i]^2 to lane i % LANES.
void add_squares(double (&lanes)[LANES], const float* x, int64_t n);

}  // namespace layerfused
