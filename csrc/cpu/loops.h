// The loops over elements that are no rule's.
#pragma once
#include <cstdint>

#include "cpu/kernels.h"

namespace layerfused {

void to_float(float* to, const void* from, int64_t storage, int64_t n);
void from_float(void* to, const float* from, int64_t storage, int64_t n);

// What is left of x when it has been stored in 16 bits.
void round_as_stored(float* x, int64_t storage, int64_t n);

// Adds x[i]^2 to lane i % LANES.
void add_squares(double (&lanes)[LANES], const float* x, int64_t n);

}  // namespace layerfused
