// What the kernel asks of the hardware, as csrc/cuda/device.h lists it, on the host.
#pragma once
#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>

#include "grid.h"

#define DEVICE inline __attribute__((always_inline))

namespace layerfused::device {

template <class T>
using Argument = const T&;

inline unsigned thread() { return unsigned(shim::self().thread); }
inline unsigned block() { return unsigned(shim::self().block->number); }
inline unsigned blocks() { return unsigned(shim::self().blocks); }

template <class T>
T& shared() { return *static_cast<T*>(shim::block_memory(sizeof(T))); }

inline void barrier() { shim::meet(shim::self().block->all); }

template <class T>
T from_lane(T value, int distance) {
  shim::Self& self = shim::self();
  const int me = self.thread, lane = me % shim::WARP;
  // who is quick writes its next value beside the one that others have yet to read, and then has to wait for them
  double* slots = &self.block->slots[size_t(++self.exchanges % 2 * self.block->threads)];
  slots[me] = double(value);
  shim::meet(self.block->warps[size_t(me / shim::WARP)]);
  return T(slots[lane + distance < shim::WARP ? me + distance : me]);
}

inline uint32_t take(uint32_t* counter) {
  return std::atomic_ref<uint32_t>(*counter).fetch_add(1, std::memory_order_relaxed);
}
inline uint32_t arrive(uint32_t* counter) {
  return std::atomic_ref<uint32_t>(*counter).fetch_add(1, std::memory_order_acq_rel);
}
inline void publish(uint32_t* flag) { std::atomic_ref<uint32_t>(*flag).store(1, std::memory_order_release); }
inline bool published(const uint32_t* flag) {
  return std::atomic_ref<uint32_t>(*const_cast<uint32_t*>(flag)).load(std::memory_order_acquire) != 0;
}
inline void pause() { shim::yield(); }

inline double add_product(double sum, float a, float b) { return sum + double(a) * double(b); }

struct Quad {
  uint32_t word[4];
};
enum class Use { again, last };

// Hardware stops at a vector that does not lie at a multiple of its size.
inline void check_vector(const char* at, bool wide) {
  if (reinterpret_cast<uintptr_t>(at) % (wide ? 16 : 8) == 0) return;
  fprintf(stderr, "misaligned vector at %p\n", static_cast<const void*>(at));
  abort();
}

template <Use use, bool constant>
DEVICE Quad load(const char* at, bool wide) {
  check_vector(at, wide);
  Quad q{};
  const auto* words = reinterpret_cast<const uint32_t*>(at);
  for (int k = 0; k < (wide ? 4 : 2); ++k) q.word[k] = words[k];
  return q;
}

template <Use use>
DEVICE void store(char* at, const Quad& q, bool wide) {
  check_vector(at, wide);
  auto* words = reinterpret_cast<uint32_t*>(at);
  for (int k = 0; k < (wide ? 4 : 2); ++k) words[k] = q.word[k];
}

template <class T>
cudaError_t start(void (*kernel)(Argument<T>), int blocks, int threads, const T& argument, cudaStream_t) {
  return shim::launch(blocks, threads, [kernel, argument] { kernel(argument); });
}

}  // namespace layerfused::device
