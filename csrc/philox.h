// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11): random words that are a function
// of where and when they are used, so that no generator has a state and every engine draws the same.
#pragma once
#include <cstdint>

#include "rule.h"

namespace layerfused {

struct Draw {
  uint32_t word[4];
};

RULE_FN Draw philox(Draw counter, uint32_t key0, uint32_t key1) {
  Draw x = counter;
#if defined(__CUDACC__)
#pragma unroll 1  // unrolled it takes registers that elements need: LAMB and SET-Adam spilled on sm_100
#endif
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t(0xD2511F53u) * x.word[0], b = uint64_t(0xCD9E8D57u) * x.word[2];
    x = {{uint32_t(b >> 32) ^ x.word[1] ^ key0, uint32_t(b), uint32_t(a >> 32) ^ x.word[3] ^ key1, uint32_t(a)}};
    key0 += 0x9E3779B9u, key1 += 0xBB67AE85u;
  }
  return x;
}

// What a draw is for: the lowest bit of a tensor's `place`.
enum Stream : int64_t { OF_P = 0, OF_V = 1 };

// For elements 8 * block to 8 * block + 7 of a tensor, in the order of its memory, in step t.
RULE_FN Draw draw(int64_t seed, int64_t place, Stream stream, uint32_t t, int64_t block) {
  const uint64_t at = uint64_t(place | stream);
  return philox({{uint32_t(block), uint32_t(at >> 32), uint32_t(at), t}}, uint32_t(seed), uint32_t(uint64_t(seed) >> 32));
}

// The 16 bits of element e of the tensor.
RULE_FN uint32_t noise(const Draw& drawn, int64_t e) { return drawn.word[e % 8 / 2] >> (16 * (e % 2)) & 0xffffu; }

}  // namespace layerfused
