// Elements between memory and registers: 16 bytes of fp32 or 8 of a 16-bit type at a time, four elements either way, so
// that every operand of an element is the same thread's and a warp touches whole lines. What is misaligned, and the end
// of a chunk, goes element by element; no other operand is slowed down by it.
#pragma once
#include "cuda/device.h"
#include "cuda/launch.h"
#include "rule.h"
#include "storage.h"

namespace layerfused::cuda {

using device::Quad;
using device::Use;

RULE_FN constexpr int count_of(unsigned operands) { return operands ? int(operands & 1) + count_of(operands >> 1) : 0; }

// A chunk's operands in memory: p, g, m, v, and where its prediction goes.
struct Places {
  static constexpr int OPERANDS = 5;
  char* at[OPERANDS];
  uint32_t storage[OPERANDS];
  unsigned vectors;  // the operands that vectors can move
  unsigned plain;    // those of them that are fp32, and need no conversion
  bool there;        // whether the tensor has a gradient

  DEVICE bool wide(int k) const { return storage[k] == FP32; }
  DEVICE char* element(int k, int i) const { return at[k] + int64_t(i) * (wide(k) ? 4 : 2); }
};

DEVICE uint32_t bits_at(const char* at, bool wide) {
  return wide ? *reinterpret_cast<const uint32_t*>(at) : *reinterpret_cast<const uint16_t*>(at);
}

// The first `inside` elements one by one, zeros behind them.
DEVICE Quad load_each(const char* at, bool wide, int inside) {
  Quad q{};
#pragma unroll
  for (int j = 0; j < QUAD; ++j) {
    const uint32_t x = j < inside ? bits_at(at + j * (wide ? 4 : 2), wide) : 0;
    if (wide) q.word[j] = x;
    else q.word[j / 2] |= x << (16 * (j % 2));
  }
  return q;
}

DEVICE void store_each(char* at, const Quad& q, bool wide, int inside) {
#pragma unroll
  for (int j = 0; j < QUAD; ++j) {
    if (j >= inside) return;
    if (wide) reinterpret_cast<uint32_t*>(at)[j] = q.word[j];
    else reinterpret_cast<uint16_t*>(at)[j] = uint16_t(q.word[j / 2] >> (16 * (j % 2)));
  }
}

// By a branch, not by a choice between three results: all threads of a block go the same way.
DEVICE void unpack(float (&x)[QUAD], const Quad& q, uint32_t storage) {
#pragma unroll
  for (int j = 0; j < QUAD; ++j) x[j] = from_bits(q.word[j]);
  if (storage == FP32) return;
#pragma unroll
  for (int j = 0; j < QUAD; ++j) {
    const uint16_t half = uint16_t(q.word[j / 2] >> (16 * (j % 2)));
    x[j] = storage == BF16 ? bf16_to_float(half) : fp16_to_float(half);
  }
}

DEVICE Quad pack(const float (&x)[QUAD], uint32_t storage) {
  Quad q{};
#pragma unroll
  for (int j = 0; j < QUAD; ++j) {
    if (storage == FP32) q.word[j] = bits(x[j]);
    else q.word[j / 2] |= uint32_t(storage == BF16 ? float_to_bf16(x[j]) : float_to_fp16(x[j])) << (16 * (j % 2));
  }
  return q;
}

// `again`: the operands that this launch will look at once more.
template <unsigned again, int k>
constexpr Use use_of = (again >> k & 1) != 0 ? Use::again : Use::last;

template <unsigned reads, unsigned again, int k, bool plain>
DEVICE void fetch_one(Quad& q, const Places& places, int i, int inside) {
  constexpr bool constant = k == 1;  // nobody writes gradients
  if constexpr ((reads >> k & 1) == 0) return;
  else if constexpr (plain) q = device::load<use_of<again, k>, constant>(places.at[k] + int64_t(i) * 4, true);
  else if ((places.vectors >> k & 1) != 0 && inside == QUAD)
    q = device::load<use_of<again, k>, constant>(places.element(k, i), places.wide(k));
  else q = load_each(places.element(k, i), places.wide(k), inside);
}

template <unsigned reads, unsigned again, bool plain>
DEVICE void fetch_all(Quad (&q)[4], const Places& places, int i, int inside, bool reads_p) {
  fetch_one<reads, again, 1, plain>(q[1], places, i, inside);
  fetch_one<reads, again, 2, plain>(q[2], places, i, inside);
  fetch_one<reads, again, 3, plain>(q[3], places, i, inside);
  if (reads_p) fetch_one<reads, again, 0, plain>(q[0], places, i, inside);
}

// Operands of four elements from the i-th of the chunk on, of which `inside` are the chunk's. Of plain ones all loads
// are under way with hardly an instruction between them. `reads_p` is false where p is declared for the sake of a
// coupled decay that is zero.
template <unsigned reads, unsigned again>
DEVICE void fetch(Quad (&q)[4], const Places& places, int i, int inside, bool plain, bool reads_p) {
  if (plain) fetch_all<reads, again, true>(q, places, i, inside, reads_p);
  else fetch_all<reads, again, false>(q, places, i, inside, reads_p);
}

template <unsigned reads, int k>
DEVICE void unpack_one(float (&x)[QUAD], const Quad& q, const Places& places, bool plain) {
  if constexpr ((reads >> k & 1) != 0) unpack(x, q, plain ? uint32_t(FP32) : places.storage[k]);
}

template <unsigned reads>
DEVICE void elements_of(Element (&x)[QUAD], const Quad (&q)[4], const Places& places, bool plain) {
  float p[QUAD] = {}, g[QUAD] = {}, m[QUAD] = {}, v[QUAD] = {};
  unpack_one<reads, 0>(p, q[0], places, plain);
  unpack_one<reads, 1>(g, q[1], places, plain);
  unpack_one<reads, 2>(m, q[2], places, plain);
  unpack_one<reads, 3>(v, q[3], places, plain);
#pragma unroll
  for (int j = 0; j < QUAD; ++j) x[j] = {p[j], g[j], m[j], v[j]};
}

template <unsigned again, int k>
DEVICE void write_one(const float (&x)[QUAD], const Places& places, int i, int inside) {
  char* at = places.element(k, i);
  if ((places.plain >> k & 1) != 0 && inside == QUAD) return device::store<use_of<again, k>>(at, pack(x, FP32), true);
  const Quad q = pack(x, places.storage[k]);
  if ((places.vectors >> k & 1) != 0 && inside == QUAD) device::store<use_of<again, k>>(at, q, places.wide(k));
  else store_each(at, q, places.wide(k), inside);
}

template <unsigned writes, unsigned again>
DEVICE void write(const Element (&x)[QUAD], const Places& places, int i, int inside) {
  const float p[QUAD] = {x[0].p, x[1].p, x[2].p, x[3].p}, m[QUAD] = {x[0].m, x[1].m, x[2].m, x[3].m};
  const float v[QUAD] = {x[0].v, x[1].v, x[2].v, x[3].v};
  if constexpr ((writes & P) != 0) write_one<again, 0>(p, places, i, inside);
  if constexpr ((writes & M) != 0) write_one<again, 2>(m, places, i, inside);
  if constexpr ((writes & V) != 0) write_one<again, 3>(v, places, i, inside);
}

DEVICE float as_stored(float x, uint32_t storage) {
  if (storage == BF16) return bf16_to_float(float_to_bf16(x));
  return storage == FP16 ? fp16_to_float(float_to_fp16(x)) : x;
}

DEVICE Element as_stored(const Element& x, const Places& places) {
  return {as_stored(x.p, places.storage[0]), x.g, as_stored(x.m, places.storage[2]), as_stored(x.v, places.storage[3])};
}

// Calls each(x, i, inside) for the elements of a chunk, four from the i-th on, and writes what it made of them. A sweep
// of one operand takes two such quads at once: it has the registers, and needs the bytes under way.
template <unsigned reads, unsigned writes, unsigned again, class Each>
DEVICE void sweep(const Places& places, int count, bool reads_p, Each&& each) {
  constexpr int quads = count_of(reads) == 1 ? 2 : 1;
  const unsigned wanted = reads_p ? reads : reads & ~P;
#pragma unroll 1
  for (int begin = QUAD * int(device::thread()); begin < count; begin += quads * TILE) {
    Quad q[quads][4];
    const bool plain = (places.plain & wanted) == wanted && begin + (quads - 1) * TILE + QUAD <= count;
#pragma unroll
    for (int k = 0; k < quads; ++k) {
      const int left = count - begin - k * TILE;
      if (k == 0 || left > 0)
        fetch<reads, again>(q[k], places, begin + k * TILE, left < QUAD ? left : QUAD, plain, reads_p);
    }
#pragma unroll
    for (int k = 0; k < quads; ++k) {
      const int left = count - begin - k * TILE, inside = left < QUAD ? left : QUAD;
      if (inside <= 0) break;
      Element x[QUAD];
      elements_of<reads>(x, q[k], places, plain);
      each(x, begin + k * TILE, inside);
      if constexpr (writes != 0) write<writes, again>(x, places, begin + k * TILE, inside);
    }
  }
}

}  // namespace layerfused::cuda
