// What one launch is told: the plan on the device, this step's numbers, and where results go.
#pragma once
#include <cstdint>

#include "plan.h"
#include "rule.h"

#if defined(__CUDACC__) && defined(__CUDACC_VER_MAJOR__) && __CUDACC_VER_MAJOR__ * 100 + __CUDACC_VER_MINOR__ < 1201
#error "nvcc 12.1 or newer is needed (LAYERFUSED_CUDA_ARCHS=none builds without the CUDA engine)"
#endif

namespace layerfused::cuda {

#if defined(LAYERFUSED_THREADS)  // the tests' host build has fewer
constexpr int THREADS = LAYERFUSED_THREADS;
#else
constexpr int THREADS = 256;
#endif
constexpr int BLOCKS = 4;               // on each multiprocessor: what 64 registers a thread allow
constexpr int QUAD = 4;                 // elements that one access moves
constexpr int TILE = QUAD * THREADS;
constexpr int WHOLE = TILE;             // a layer of up to so many stays in one block's shared memory meanwhile
constexpr int MAX_SCALARS = 16;         // floats that a rule hands from `finish` to `apply`

// A chunk with all that a block needs to know of its layer: one look instead of two.
struct alignas(16) Row {
  int64_t start;  // in its tensor
  int32_t count, tensor, layer, group;
  int32_t first, chunks;  // of its layer
  int32_t adapt, state, states, unused;
};

// What the host says of a step, as 8-byte words: integers, addresses and doubles. What changes most often comes first,
// so that one short range of words covers it.
struct Words {
  int64_t tensors, layers, numbers;  // how many; `numbers` is MAX_NORM, AHEAD and the rows of all groups
  int64_t ways;                      // 1 where some tensor is stored by a way of its own, else 0

  RULE_FN int64_t gradient(int64_t tensor) const { return tensor; }
  RULE_FN int64_t number(int64_t k) const { return tensors + k; }
  RULE_FN int64_t place(int64_t k) const { return tensors + numbers + k; }  // where it lives on the device, or 0
  RULE_FN int64_t elements(int64_t layer) const { return tensors + 2 * numbers + layer; }  // with gradients; or -1
  // the storage codes of p, g, m and v, a byte each; the fifth byte is 1 where this step counts
  RULE_FN int64_t types(int64_t tensor) const { return tensors + 2 * numbers + layers + tensor; }
  RULE_FN int64_t p(int64_t tensor) const { return types(tensor) + tensors; }
  RULE_FN int64_t m(int64_t tensor) const { return types(tensor) + 2 * tensors; }
  RULE_FN int64_t v(int64_t tensor) const { return types(tensor) + 3 * tensors; }
  RULE_FN int64_t predicted(int64_t tensor) const { return types(tensor) + 4 * tensors; }
  // only where there are ways
  RULE_FN int64_t rest(int64_t tensor) const { return types(tensor) + 5 * tensors; }
  RULE_FN int64_t noise_seed(int64_t tensor) const { return types(tensor) + 6 * tensors; }
  RULE_FN int64_t noise_place(int64_t tensor) const { return types(tensor) + 7 * tensors; }
  RULE_FN int64_t size() const { return (6 + 3 * ways) * tensors + 2 * numbers + layers; }
};

// What comes before the rows.
enum Number : int64_t { MAX_NORM = 0, AHEAD = 1, ROWS = 2 };

// Memory on the device.
struct Tables {
  const int32_t* items;  // kind + 4 * (the chunk's number), in the order of their tickets; norm items first
  const Row* rows;       // of each chunk
  int64_t* words;        // as Words says; what the argument brings is put in when the launch ends
  uint32_t* counters;    // zero between launches
  double* partials;      // [chunks, stats]
  double* norm_partials; // [chunks]
  float* scalars;        // [layers, MAX_SCALARS]
  float* step;           // [tensors] steps taken
  double* state;         // [slots] the rule's layer state
  double* stats;         // [layers, stats]
  double* report;        // [layers, reports]
  double* norm;          // the gradient norm over all tensors
  int64_t* skipped;      // steps that changed nothing
  const float* grad_scale;  // what gradients were multiplied with, or nullptr
  const float* found_inf;   // not 0 where a gradient is not finite, or nullptr
};

// Counters, each in a cache line of its own, for who polls one drops it; then of each layer ARRIVED and READY in turn.
enum Counter : int { TICKET = 0, LEFT = 32, NORMS = 64, NORM_READY = 96, ARRIVED = 128 };

struct Header {
  Tables at;
  Words words;
  int32_t items, norms, counters;
  uint32_t phases;
  bool clip, live, keep;  // `live`: some number lives on the device; `keep`: the words sent are for later launches too
  bool leads;             // predicted weights go to Words::predicted, and those at Words::p are the true ones
  int32_t first, sent;    // the range of words that came with the argument
};

// A launch and the words that changed since the last one.
template <int WORDS>
struct Launch : Header {
  int64_t word[WORDS];
};
// What the driver takes: 4 KiB cheaply, 32,764 bytes at most.
constexpr int FEW = (4096 - int(sizeof(Header))) / 8, MANY = (32764 - int(sizeof(Header))) / 8;

}  // namespace layerfused::cuda
