// The CPU engine: runs any rule over any plan with any number of threads, with the same bits for each number.
#pragma once
#include <atomic>
#include <memory>
#include <string>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/pass.h"
#include "plan.h"

namespace layerfused {

// Memory that the optimizer owns and the engine writes.
struct Outputs {
  float* step;           // [tensors] steps taken
  double* state;         // [state slots] the rule's layer state
  double* stats;         // [layers, stats]
  double* report;        // [layers, reports]
  double* norm;          // the gradient norm over all tensors
};

class Engine {
 public:
  Engine(const std::string& rule, std::vector<Item> items, std::vector<Chunk> chunks, std::vector<Layer> layers,
         int64_t tensors);

  Column p, g, m, v;
  Ways ways;
  Column predicted;  // where the launch leads: the parameters, p being a copy with the true weights
  float ahead = 0;   // how many steps on is predicted
  Outputs out{};

  // `groups` holds a row per group: the sign of the gradient, then the rule's hyper-parameters.
  // A `max_norm` above 0 clips by Outputs::norm, which the phase NORM computes first; without it the norm is given.
  // Answers whether the step took place: with a norm that is not finite nothing is changed.
  bool run(unsigned phases, const double* groups, double max_norm, int threads);

  const Kernels& rule() const { return kernels_; }
  int64_t tensors() const { return tensors_; }
  int64_t workspace_bytes() const;

 private:
  struct Arrivals {
    std::atomic<int64_t> count{0};
    std::atomic<bool> ready{false};
  };

  // The scalars of the last group and step a worker began: most items share them with the item before.
  struct Started {
    const double* group = nullptr;
    double t = 0;
    Scalars scalars;
  };

  struct Worker {
    Started started;
    std::vector<int64_t> reduced;  // chunks that may still lie in its own cache, the latest last
  };

  void work();
  void run_item(const Item&, Worker&);
  void run_whole(int64_t layer, Worker&);
  int64_t take(int64_t layer, Worker&);
  const Scalars& start(const Layer&, Started&) const;
  void norm_chunk(const Chunk&, int64_t slot);
  void clip();
  void reduce_chunk(const Chunk&, int64_t slot, Worker&);
  void combine(int64_t layer);
  void finish(int64_t layer, Started&);
  void apply_chunk(const Chunk&);
  void apply_elementwise(const Chunk&, Worker&);
  void finish_phase();
  void advance();
  void reset();
  int64_t live_elements(const Layer&) const;
  bool has_stats(const Layer& layer) const { return layer.adapt != 0 && kernels_.stats() > 0; }
  double time(const Layer&) const;
  const double* group(const Layer& layer) const { return groups_ + layer.group * (kernels_.hyper + 1) + 1; }
  float scale(const Layer& layer) const { return float(groups_[layer.group * (kernels_.hyper + 1)] * factor_); }
  bool leads() const { return predicted.address != nullptr; }
  template <class Run>
  void sweep(const Chunk&, Sweep operands, Run&& run) const;
  void update(const Chunk&, Sweep operands, Update plain, Update leading, const Scalars&) const;
  void predict_item(const Item&) const;
  void predict_chunk(const Chunk&) const;

  const Kernels& kernels_;
  std::vector<Item> items_;
  std::vector<Chunk> chunks_;
  std::vector<Layer> layers_;
  std::vector<int64_t> first_chunk_;  // of each tensor
  int64_t tensors_;

  std::vector<double> partials_, norm_partials_;  // one row per chunk
  std::vector<Scalars> scalars_;                  // one per layer
  std::unique_ptr<Arrivals[]> arrivals_;          // one per layer
  std::unique_ptr<std::atomic<bool>[]> taken_;    // one per chunk: its apply has been begun
  Arrivals norm_arrivals_;
  std::atomic<int64_t> ticket_{0};

  unsigned phases_ = 0;
  const double* groups_ = nullptr;
  double max_norm_ = 0, factor_ = 1;
  bool skip_ = false;
};

}  // namespace layerfused
