#include "cpu/loops.h"

#include "cpu/clones.h"
#include "storage.h"

namespace layerfused {

CLONES void to_float(float* to, const void* from, int64_t storage, int64_t n) {
  const auto* half = static_cast<const uint16_t*>(from);
  if (type_of(storage) == BF16)
    for (int64_t i = 0; i < n; ++i) to[i] = bf16_to_float(half[i]);
  else
    for (int64_t i = 0; i < n; ++i) to[i] = fp16_to_float(half[i]);
}

CLONES void from_float(void* to, const float* from, int64_t storage, int64_t n) {
  auto* half = static_cast<uint16_t*>(to);
  if (type_of(storage) == BF16)
    for (int64_t i = 0; i < n; ++i) half[i] = float_to_bf16(from[i]);
  else
    for (int64_t i = 0; i < n; ++i) half[i] = float_to_fp16(from[i]);
}

CLONES void join(float* to, const void* from, const void* rest, int64_t storage, int64_t n) {
  const auto *half = static_cast<const uint16_t*>(from), *left = static_cast<const uint16_t*>(rest);
  if (way_of(storage) == REMAINDER)
    for (int64_t i = 0; i < n; ++i) to[i] = join_remainder(half[i], left[i]);
  else if (type_of(storage) == BF16)
    for (int64_t i = 0; i < n; ++i) to[i] = bf16_to_float(half[i]) + bf16_to_float(left[i]);
  else
    for (int64_t i = 0; i < n; ++i) to[i] = fp16_to_float(half[i]) + fp16_to_float(left[i]);
}

CLONES void split(void* to, void* rest, const float* from, int64_t storage, int64_t n) {
  auto *half = static_cast<uint16_t*>(to), *left = static_cast<uint16_t*>(rest);
  if (way_of(storage) == REMAINDER) {
    for (int64_t i = 0; i < n; ++i) half[i] = remainder_high(from[i]), left[i] = remainder_rest(from[i]);
  } else if (type_of(storage) == BF16) {
    for (int64_t i = 0; i < n; ++i) {
      half[i] = float_to_bf16(from[i]);
      left[i] = float_to_bf16(compensation(from[i], bf16_to_float(half[i])));
    }
  } else {
    for (int64_t i = 0; i < n; ++i) {
      half[i] = float_to_fp16(from[i]);
      left[i] = float_to_fp16(compensation(from[i], fp16_to_float(half[i])));
    }
  }
}

namespace {

// 8 random 16-bit numbers a block, in the order of their elements: a word's lower half comes first in memory, too.
RULE_FN void draw_blocks(uint16_t* to, const Noise& noise, int64_t first, int64_t blocks) {
  static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the halves of a word would be swapped");
  uint32_t word[4][LANES];
  for (int64_t b = 0; b < blocks; b += LANES) {
#pragma GCC unroll 1
    for (int j = 0; j < LANES; ++j) {
      const Draw drawn = draw(noise.seed, noise.place, noise.stream, noise.t, first + b + j);
      for (int k = 0; k < 4; ++k) word[k][j] = drawn.word[k];
    }
    for (int j = 0; j < LANES; ++j)
      for (int k = 0; k < 4; ++k) std::memcpy(to + 8 * (b + j) + 2 * k, &word[k][j], 4);
  }
}

}  // namespace

CLONES void from_float_stochastic(void* to, const float* from, int64_t storage, const Noise& noise, int64_t start,
                                  int64_t n) {
  alignas(64) uint16_t drawn[TILE + 8 * LANES];
  const int64_t first = start / 8;
  draw_blocks(drawn, noise, first, (start + n + 7) / 8 - first);
  auto* half = static_cast<uint16_t*>(to);
  const uint16_t* r = drawn + start % 8;
  if (type_of(storage) == BF16)
    for (int64_t i = 0; i < n; ++i) half[i] = stochastic_bf16(from[i], r[i]);
  else
    for (int64_t i = 0; i < n; ++i) half[i] = stochastic_fp16(from[i], r[i]);
}

CLONES void round_as_stored(float* x, int64_t storage, int64_t n) {
  if (type_of(storage) == BF16)
    for (int64_t i = 0; i < n; ++i) x[i] = bf16_to_float(float_to_bf16(x[i]));
  else if (type_of(storage) == FP16)
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
