#include "cpu/loops.h"

#include "cpu/clones.h"
#include "storage.h"

namespace layerfused {

CLONES void to_float(float* to, const void* from, int64_t storage, int64_t n) {
  const auto* half = static_cast<const uint16_t*>(from);
  if (storage == BF16)
    for (int64_t i = 0; i < n; ++i) to[i] = bf16_to_float(half[i]);
  else
    for (int64_t i = 0; i < n; ++i) to[i] = fp16_to_float(half[i]);
}

CLONES void from_float(void* to, const float* from, int64_t storage, int64_t n) {
  auto* half = static_cast<uint16_t*>(to);
  if (storage == BF16)
    for (int64_t i = 0; i < n; ++i) half[i] = float_to_bf16(from[i]);
  else
    for (int64_t i = 0; i < n; ++i) half[i] = float_to_fp16(from[i]);
}

CLONES void round_as_stored(float* x, int64_t storage, int64_t n) {
  if (storage == BF16)
    for (int64_t i = 0; i < n; ++i) x[i] = bf16_to_float(float_to_bf16(x[i]));
  else if (storage == FP16)
    for (int64_t i = 0; i < n; ++i) x[i] = fp16_to_float(float_to_fp16(x[i]));
}

CLONES void add_squares(double (&lanes)[LANES], const float* x, int64_t n) {
  double sum[LANES];
  for (int j = 0; j < LANES; ++j) sum[j] = lanes[j];
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES)
#pragma GCC unroll 1  // see for_each() in rule.cpp
    for (int j = 0; j < LANES; ++j) sum[j] += double(x[i + j]) * double(x[i + j]);
  for (int j = 0; i + j < n; ++j) sum[j] += double(x[i + j]) * double(x[i + j]);
  for (int j = 0; j < LANES; ++j) lanes[j] = sum[j];
}

}  // namespace layerfused
