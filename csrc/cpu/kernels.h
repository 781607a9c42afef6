// What a rule becomes on the CPU: its name, its needs, and its sweeps compiled for this machine.
#pragma once
#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "rule.h"

namespace layerfused {

constexpr int LANES = 16;  // accumulators per sum: fixed, so that every instruction set adds in the same order
constexpr int MAX_SUMS = 4, MAX_MINIMA = 2, MAX_STATS = MAX_SUMS + MAX_MINIMA, MAX_REPORTS = 8;
constexpr int64_t TILE = 2048;  // elements per call of a sweep: four fp32 operands of it fit L1

struct Lanes {
  double sum[MAX_SUMS][LANES];
  float least[MAX_MINIMA][LANES];
};

// A tile's operands in fp32: the tensor's own memory, or a converted copy.
struct Tile {
  float *p, *g, *m, *v, *predicted;
};

// One call of a sweep: what it works on, and what it asks the memory for meanwhile.
struct Stretch {
  Tile tile, ahead;
  int64_t n;
};

// A rule's own `Scalars`, as the engine carries them from `finish` to `apply`.
struct alignas(64) Scalars {
  float values[16];
};

// An update with the gradient times `scale`; a leading one writes the prediction `ahead` steps on, too.
using Update = void (*)(const Scalars&, float scale, float ahead, const Stretch&);

struct Kernels {
  const char* name;
  int hyper, sums, minima, reports;
  bool couples;  // the first sweep reads p too where coupled decay is not zero
  Sweep reduce_sweep, apply_sweep;
  void (*start)(const double* group, double t, Scalars&);
  void (*finish)(const double* group, const Total&, Scalars&);
  void (*recall)(const double* group, const Total&, Scalars&);
  float (*coupled)(const Scalars&);
  void (*reduce)(const Scalars&, float scale, const Stretch&, Lanes&);
  Update apply, apply_leading, both, both_leading;
  unsigned predict_reads;
  void (*predict)(const Scalars&, float ahead, const Stretch&);

  int stats() const { return sums + minima; }
  // Moments and update in one sweep, for layers without stats.
  Sweep both_sweep() const {
    return {reduce_sweep.reads | apply_sweep.reads, reduce_sweep.writes | apply_sweep.writes};
  }
};

std::vector<const Kernels*>& rules();  // filled by rule.cpp, once per header in csrc/rules

}  // namespace layerfused
