// How numbers lie in memory: fp32, bf16 and fp16, which are fp32 in registers, and by which way a number that is longer
// than its 16 bits gets there and back. Everything is integer arithmetic of our own, or one fp32 addition, the same on
// every engine and instruction set.
#pragma once
#include <cstdint>
#include <cstring>

#include "rule.h"

namespace layerfused {

// A storage code is a type and a way. Fp32 has the way NEAREST alone; m and g, too.
enum Storage : int64_t { FP32 = 0, BF16 = 1, FP16 = 2 };
enum Way : int64_t {
  NEAREST = 0,     // rounded to nearest even
  MASTER = 1,      // the number lies in `rest` as fp32, and rounded to nearest even in its place
  REMAINDER = 2,   // of bf16: `rest` holds the lower 16 bits
  KAHAN = 3,       // `rest` holds what rounding to nearest even left over, in the same type
  STOCHASTIC = 4,  // rounded up as often as the number is far from the one below
};

RULE_FN int64_t type_of(int64_t code) { return code & 3; }
RULE_FN int64_t way_of(int64_t code) { return code >> 2; }
RULE_FN int64_t size_of(int64_t code) { return type_of(code) == FP32 ? 4 : 2; }
RULE_FN bool has_rest(int64_t code) { return way_of(code) >= MASTER && way_of(code) <= KAHAN; }
RULE_FN int64_t rest_size_of(int64_t code) { return way_of(code) == MASTER ? 4 : 2; }

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
RULE_FN bool is_finite(float x) { return (bits(x) & 0x7f800000u) != 0x7f800000u; }

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

// REMAINDER. The upper half is rounded with ties away from zero: 16 bits cannot tell which way a tie to even went.
RULE_FN float join_remainder(uint16_t high, uint16_t rest) {
  return from_bits((uint32_t(high) << 16) + uint32_t(int32_t(int16_t(rest))));
}
RULE_FN uint16_t remainder_high(float x) {
  const uint32_t u = bits(x);
  return uint16_t((u & 0x7fffffffu) > 0x7f800000u ? (u >> 16) | 0x40u : (u + 0x8000u) >> 16);
}
RULE_FN uint16_t remainder_rest(float x) {
  const uint32_t u = bits(x);
  return uint16_t((u & 0x7fffffffu) > 0x7f800000u ? 0 : u);
}

// KAHAN: what is left of x beside `stored`, for which it was rounded; it is rounded to the same type then. Nothing is
// left where one of them is not finite.
RULE_FN float compensation(float x, float stored) { return is_finite(x) && is_finite(stored) ? x - stored : 0.0f; }

// STOCHASTIC, by 16 random bits r.
RULE_FN uint16_t stochastic_bf16(float x, uint32_t r) {
  return is_finite(x) ? uint16_t((bits(x) + r) >> 16) : float_to_bf16(x);
}
RULE_FN uint16_t stochastic_fp16(float x, uint32_t r) {
  const uint32_t u = bits(x), sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
  const uint32_t normal = (magnitude - (112u << 23) + (r >> 3)) >> 13;
  // Below the normal numbers the distance is 2^-24: `shift` bits of the significand lie under it. Where they are more
  // than 31, the number is less than 2^-7 of that distance, and 0 then.
  const uint32_t shift = 126u - (magnitude >> 23), s = shift & 31u;
  const uint32_t significand = (magnitude & 0x7fffffu) | 0x800000u, up = (r << 16) >> ((32u - s) & 31u);
  const uint32_t subnormal = shift > 31u ? 0u : (significand + up) >> s;
  const uint32_t rounded = magnitude < (113u << 23) ? subnormal : normal < 0x7c00u ? normal : 0x7c00u;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  return uint16_t(sign | (magnitude >= 0x7f800000u ? special : rounded));
}

}  // namespace layerfused
