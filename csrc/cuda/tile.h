// Elements between memory and registers: 16 bytes of fp32 or 8 of a 16-bit type at a time, four elements either way, so
// that every operand of an element is the same thread's and a warp touches whole lines. What is misaligned, and the end
// of a chunk, goes element by element; no other operand is slowed down by it.
#pragma once
#include "cuda/device.h"
#include "cuda/launch.h"
#include "philox.h"
#include "rule.h"
#include "storage.h"

namespace layerfused::cuda {

using device::Quad;
using device::Use;

RULE_FN constexpr int count_of(unsigned operands) { return operands ? int(operands & 1) + count_of(operands >> 1) : 0; }

// A chunk's operands in memory: p, g, m, v, where its prediction goes, and the other part of a p that has two. Of way
// MASTER p is the master, and the other part the copy of it that is the parameter.
struct Places {
  static constexpr int OPERANDS = 6, OTHER = 5;
  char* at[OPERANDS];
  uint32_t storage[OPERANDS];
  unsigned vectors;  // the operands that vectors can move
  unsigned plain;    // those of them that are fp32 in one part, and need no conversion
  bool there;        // whether the tensor has a gradient
  int64_t first;     // element of its tensor
  int64_t seed, place;  // what its noise is drawn by, in this step
  uint32_t time;

  DEVICE bool wide(int k) const { return type_of(storage[k]) == FP32; }
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

// The j-th 16 bits of a quad.
DEVICE uint16_t half(const Quad& q, int j) { return uint16_t(q.word[j / 2] >> (16 * (j % 2))); }
template <class Narrow>
DEVICE Quad pack_each(const float (&x)[QUAD], Narrow&& narrow) {
  Quad q{};
#pragma unroll
  for (int j = 0; j < QUAD; ++j) q.word[j / 2] |= uint32_t(narrow(x[j])) << (16 * (j % 2));
  return q;
}

DEVICE float widened(uint16_t x, uint32_t type) { return type == BF16 ? bf16_to_float(x) : fp16_to_float(x); }
DEVICE uint16_t narrowed(float x, uint32_t type) { return type == BF16 ? float_to_bf16(x) : float_to_fp16(x); }
DEVICE float as_stored(float x, uint32_t type) { return type == FP32 ? x : widened(narrowed(x, type), type); }

// By a branch, not by a choice between three results: all threads of a block go the same way.
DEVICE void unpack(float (&x)[QUAD], const Quad& q, uint32_t type) {
#pragma unroll
  for (int j = 0; j < QUAD; ++j) x[j] = from_bits(q.word[j]);
  if (type == FP32) return;
#pragma unroll
  for (int j = 0; j < QUAD; ++j) x[j] = widened(half(q, j), type);
}

DEVICE Quad pack(const float (&x)[QUAD], uint32_t type) {
  if (type == FP32) return {{bits(x[0]), bits(x[1]), bits(x[2]), bits(x[3])}};
  return pack_each(x, [type](float y) { return narrowed(y, type); });
}

// Ways (storage.h)

// Whether p is in two parts, both of 16 bits. They come as the halves of one quad.
DEVICE bool is_split(uint32_t code) { return way_of(code) == REMAINDER || way_of(code) == KAHAN; }

DEVICE void join(float (&x)[QUAD], const Quad& q, uint32_t code) {
#pragma unroll
  for (int j = 0; j < QUAD; ++j) {
    const uint16_t rest = half(q, QUAD + j);
    if (way_of(code) == REMAINDER) x[j] = join_remainder(half(q, j), rest);
    else x[j] += widened(rest, type_of(code));
  }
}

// 16 random bits for each of four elements of a chunk, from the i-th on. What is drawn at once is for eight elements of
// the tensor; where the chunk begins askew to that, some threads draw twice.
template <Stream stream>
DEVICE uint64_t random_bits(const Places& places, int i) {
  const int64_t e = places.first + i, block = e / 8;
  const bool second = e % 8 >= QUAD;
  const Draw own = draw(places.seed, places.place, stream, places.time, block);
  const uint64_t early = own.word[0] | uint64_t(own.word[1]) << 32, late = own.word[2] | uint64_t(own.word[3]) << 32;
  const int shift = 16 * int(e % QUAD);
  if (shift == 0) return second ? late : early;
  if (!second) return early >> shift | late << (64 - shift);
  const Draw next = draw(places.seed, places.place, stream, places.time, block + 1);
  return late >> shift | (next.word[0] | uint64_t(next.word[1]) << 32) << (64 - shift);
}

DEVICE Quad pack_at_random(const float (&x)[QUAD], uint32_t type, uint64_t random) {
  return pack_each(x, [&](float y) {
    const uint32_t r = uint32_t(random) & 0xffffu;
    random >>= 16;
    return type == BF16 ? stochastic_bf16(y, r) : stochastic_fp16(y, r);
  });
}

// `again`: the operands that this launch will look at once more.
template <unsigned again, int k>
constexpr Use use_of = (again >> k & 1) != 0 ? Use::again : Use::last;

template <Use use, int k>
DEVICE Quad load_any(const Places& places, int i, int inside) {
  constexpr bool constant = k == 1;  // nobody writes gradients
  if ((places.vectors >> k & 1) != 0 && inside == QUAD)
    return device::load<use, constant>(places.element(k, i), places.wide(k));
  return load_each(places.element(k, i), places.wide(k), inside);
}

template <unsigned reads, unsigned again, int k, bool plain>
DEVICE void fetch_one(Quad& q, const Places& places, int i, int inside) {
  constexpr Use use = use_of<again, k>;
  if constexpr ((reads >> k & 1) == 0) return;
  else if constexpr (plain) q = device::load<use, k == 1>(places.at[k] + int64_t(i) * 4, true);
  else q = load_any<use, k>(places, i, inside);
  if constexpr (k == 0 && (reads & P) != 0 && !plain) {
    if (!is_split(places.storage[0])) return;
    const Quad rest = load_any<use, Places::OTHER>(places, i, inside);
    q.word[2] = rest.word[0], q.word[3] = rest.word[1];
  }
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
  if constexpr ((reads >> k & 1) == 0) return;
  const uint32_t code = plain ? uint32_t(FP32) : places.storage[k];
  unpack(x, q, type_of(code));
  if constexpr (k == 0)
    if (is_split(code)) join(x, q, code);
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

template <Use use, int k>
DEVICE void store_any(const Quad& q, const Places& places, int i, int inside) {
  char* at = places.element(k, i);
  if ((places.vectors >> k & 1) != 0 && inside == QUAD) device::store<use>(at, q, places.wide(k));
  else store_each(at, q, places.wide(k), inside);
}

// Four elements as they lie in the operand's own place.
template <int k>
DEVICE Quad pack_own(const float (&x)[QUAD], const Places& places, int i) {
  const uint32_t code = places.storage[k];
  if constexpr (k == 0)
    if (way_of(code) == REMAINDER) return pack_each(x, remainder_high);
  if constexpr (k == 0 || k == 3)
    if (way_of(code) == STOCHASTIC) return pack_at_random(x, type_of(code), random_bits<k == 0 ? OF_P : OF_V>(places, i));
  return pack(x, type_of(code));
}

// What of them lies in the other place of a p that has two.
DEVICE Quad pack_other(const float (&x)[QUAD], const Places& places) {
  const uint32_t way = way_of(places.storage[0]), type = places.storage[Places::OTHER];
  if (way == MASTER) return pack(x, type);
  if (way == REMAINDER) return pack_each(x, remainder_rest);
  return pack_each(x, [type](float y) { return narrowed(compensation(y, as_stored(y, type)), type); });
}

template <unsigned again, int k>
DEVICE void write_one(const float (&x)[QUAD], const Places& places, int i, int inside) {
  constexpr Use use = use_of<again, k>;
  if ((places.plain >> k & 1) != 0 && inside == QUAD)
    return device::store<use>(places.element(k, i), pack(x, FP32), true);
  if constexpr (k == 0)
    if (has_rest(places.storage[0])) store_any<use, Places::OTHER>(pack_other(x, places), places, i, inside);
  store_any<use, k>(pack_own<k>(x, places, i), places, i, inside);
}

// p comes last: its ways take the most registers, and by then the others are free.
template <unsigned writes, unsigned again>
DEVICE void write(const Element (&x)[QUAD], const Places& places, int i, int inside) {
  const float p[QUAD] = {x[0].p, x[1].p, x[2].p, x[3].p}, m[QUAD] = {x[0].m, x[1].m, x[2].m, x[3].m};
  const float v[QUAD] = {x[0].v, x[1].v, x[2].v, x[3].v};
  if constexpr ((writes & M) != 0) write_one<again, 2>(m, places, i, inside);
  if constexpr ((writes & V) != 0) write_one<again, 3>(v, places, i, inside);
  if constexpr ((writes & P) != 0) write_one<again, 0>(p, places, i, inside);
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
