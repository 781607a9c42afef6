// Storage types: fp32, bf16 and fp16 in memory, fp32 in registers. Rounding to 16 bits is to nearest even in integer
// arithmetic of our own, the same on every engine and instruction set.
#pragma once
#include <cstdint>
#include <cstring>

#include "rule.h"

namespace layerfused {

enum Storage : int64_t { FP32 = 0, BF16 = 1, FP16 = 2 };

RULE_FN int64_t size_of(int64_t storage) { return storage == FP32 ? 4 : 2; }

RULE_FN uint32_t bits(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return u;
}
RULE_FN float from_bits(uint32_t u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}

RULE_FN float bf16_to_float(uint16_t h) { return from_bits(uint32_t(h) << 16); }
RULE_FN uint16_t float_to_bf16(float x) {
  const uint32_t u = bits(x), rounded = (u + 0x7fffu + ((u >> 16) & 1)) >> 16;
  const uint32_t quiet = (u >> 16) | 0x40u;  // a NaN must not round to infinity
  return uint16_t((u & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
}

RULE_FN float fp16_to_float(uint16_t h) {
  const uint32_t magnitude = uint32_t(h & 0x7fffu) << 13, sign = uint32_t(h & 0x8000u) << 16;
  const uint32_t finite = bits(from_bits(magnitude) * 0x1p112f);  // exact: rebiases normals and subnormals alike
  const uint32_t special = magnitude | 0x7f800000u;
  return from_bits(sign | ((h & 0x7c00u) == 0x7c00u ? special : finite));
}
RULE_FN uint16_t float_to_fp16(float x) {
  const uint32_t u = bits(x), sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1)) >> 13;
  const uint32_t subnormal = bits(from_bits(magnitude) + 0.5f) - bits(0.5f);  // the addition rounds to 2^-24 for us
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t rounded = magnitude < (113u << 23) ? subnormal : normal;
  return uint16_t(sign | (magnitude >= (143u << 23) ? special : rounded));
}

}  // namespace layerfused
