// What the kernel asks of the hardware, each in one function. tests/shim/cuda/device.h is the same list for the host.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#define DEVICE __device__ __forceinline__

namespace layerfused::device {

// A kernel's argument, read where the driver put it: no copy in each thread.
template <class T>
using Argument = const T;

// Asked anew each time: else the compiler keeps whatever follows from it in registers, from item to item.
DEVICE unsigned thread() {
  unsigned x;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
  return x;
}
DEVICE unsigned block() { return blockIdx.x; }
DEVICE unsigned blocks() { return gridDim.x; }

// Memory of the block.
template <class T>
DEVICE T& shared() {
  __shared__ T memory;
  return memory;
}

// All threads of the block meet; what any of them wrote before is seen by all after.
DEVICE void barrier() { __syncthreads(); }

// The value of the lane `distance` further on in the warp.
template <class T>
DEVICE T from_lane(T value, int distance) { return __shfl_down_sync(~0u, value, distance); }

// Counters and flags in global memory. `take` orders nothing; `arrive` publishes what this thread has written or seen
// (so behind a barrier, what its block has) and acquires what all who arrived before published; likewise the flag.
DEVICE uint32_t take(uint32_t* counter) {
  uint32_t before;
  asm volatile("atom.relaxed.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
  return before;
}
DEVICE uint32_t arrive(uint32_t* counter) {
  uint32_t before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
  return before;
}
DEVICE void publish(uint32_t* flag) {
  asm volatile("st.release.gpu.global.u32 [%0], 1;" ::"l"(flag) : "memory");
}
DEVICE bool published(const uint32_t* flag) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
  return value != 0;
}
DEVICE void pause() { __nanosleep(40); }

// A sum and a product of which the product is exact, so that this rounds as the two operations do.
DEVICE double add_product(double sum, float a, float b) { return __fma_rn(double(a), double(b), sum); }

// Four elements as they lie in memory: four words of fp32, two of 16 bits. `wide` says which; a predicate instead of a
// branch keeps all loads of a tile under way at once.
struct Quad {
  uint32_t word[4];
};

// What becomes of the line that is touched: needed again in this launch, or not before the next.
enum class Use { again, last };

#define LAYERFUSED_LOAD(instruction)                                                         \
  asm volatile(                                                                              \
      "{ .reg .pred wide;\n"                                                                 \
      "setp.ne.u32 wide, %5, 0;\n"                                                           \
      "@wide " instruction ".v4.u32 {%0, %1, %2, %3}, [%4];\n"                               \
      "@!wide " instruction ".v2.u32 {%0, %1}, [%4]; }"                                      \
      : "+r"(q.word[0]), "+r"(q.word[1]), "+r"(q.word[2]), "+r"(q.word[3])                   \
      : "l"(at), "r"(unsigned(wide))                                                         \
      : "memory")

#define LAYERFUSED_STORE(instruction)                                                        \
  asm volatile(                                                                              \
      "{ .reg .pred wide;\n"                                                                 \
      "setp.ne.u32 wide, %5, 0;\n"                                                           \
      "@wide " instruction ".v4.u32 [%4], {%0, %1, %2, %3};\n"                               \
      "@!wide " instruction ".v2.u32 [%4], {%0, %1}; }" ::"r"(q.word[0]),                    \
      "r"(q.word[1]), "r"(q.word[2]), "r"(q.word[3]), "l"(at), "r"(unsigned(wide))           \
      : "memory")

// `constant`: nothing writes there during the launch. Of p, m and v that is not so: then L1 is passed by.
template <Use use, bool constant>
DEVICE Quad load(const char* at, bool wide) {
  Quad q{};
  if constexpr (constant && use == Use::last) LAYERFUSED_LOAD("ld.global.cs.nc");
  if constexpr (constant && use == Use::again) LAYERFUSED_LOAD("ld.global.cg.nc");
  if constexpr (!constant && use == Use::last) LAYERFUSED_LOAD("ld.global.cs");
  if constexpr (!constant && use == Use::again) LAYERFUSED_LOAD("ld.global.cg");
  return q;
}

template <Use use>
DEVICE void store(char* at, const Quad& q, bool wide) {
  if constexpr (use == Use::last) LAYERFUSED_STORE("st.global.cs");
  if constexpr (use == Use::again) LAYERFUSED_STORE("st.global.cg");
}

#undef LAYERFUSED_LOAD
#undef LAYERFUSED_STORE

// Starts a kernel whose only argument is `argument`.
template <class T>
cudaError_t start(void (*kernel)(Argument<T>), int blocks, int threads, const T& argument, cudaStream_t stream) {
  void* arguments[] = {const_cast<T*>(&argument)};
  return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(blocks), dim3(threads), arguments, 0, stream);
}

}  // namespace layerfused::device
