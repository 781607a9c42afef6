// A grid on the host: a fiber for each of its threads, or with SHIM_THREADS a thread of the system, which is what
// sanitizers understand. Fibers take turns at barriers, exchanges between lanes and waits, the next block chosen by a
// seeded generator: every seed is another interleaving, and the same one again.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

namespace shim {

constexpr int WARP = 32;

struct Meeting {  // of `size` threads, again and again
  int size = 0, arrived = 0, round = 0;
};

struct alignas(128) Memory {
  char bytes[48 * 1024];  // what a block has without asking for more
};

struct Block {
  int number, threads;
  Meeting all;
  std::vector<Meeting> warps;
  std::vector<double> slots;  // two for each thread, for exchanges between lanes in turn
  std::unique_ptr<Memory> memory;
};

struct Self {
  Block* block;
  int thread, blocks, exchanges;
};
Self& self();

void meet(Meeting&);
void yield();
void* block_memory(size_t bytes);  // filled with what no program should take for a value
void run(int blocks, int threads, const std::function<void()>& kernel);

}  // namespace shim
