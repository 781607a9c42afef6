// The CUDA engine's host side: keeps the tables on the device in step with what the host says, and launches the kernel.
#pragma once
#include <string>
#include <vector>

#include "cuda/kernels.h"
#include "cuda/ring.h"

namespace layerfused::cuda {

// Memory on the device that the optimizer owns and the engine writes; `state` may be 0.
struct Outputs {
  int64_t step, state, stats, report, norm;
};

// One step's addresses and numbers, of host memory that lives as long as the call.
struct Given {
  const int64_t* addresses;  // [tensors, 4] of p, g, m, v; 0 is an operand that is not there
  const int64_t* types;      // [tensors] their storage types, a byte each
  const double* numbers;     // max_norm, ahead, then a row per group: the gradient's sign and the hyper-parameters
  const int64_t* places;     // of each number: where it lives on the device (odd: as float64), or 0
  const int64_t* predicted;  // [tensors] where predicted weights go; nullptr: none are made
};

// Whether and how a step takes place: addresses on the device, the last two may be 0.
struct Conditions {
  bool clip;
  int64_t skipped, grad_scale, found_inf;
};

class Engine {
 public:
  Engine(const std::string& rule, const std::vector<Item>&, const std::vector<Chunk>&, const std::vector<Layer>&,
         int64_t tensors, int64_t groups);

  // Takes where the rest of each parameter lies, 0 where it has none, and what its noise is drawn by. Before `bind`.
  void set_precision(const int64_t* rests, const int64_t* seeds, const int64_t* places);
  // Takes a zeroed workspace on the device and brings the plan there.
  void bind(int device, int64_t workspace, cudaStream_t);
  // Takes what the host says of the next launches. What is too much for a launch's argument goes to the device now, so
  // that a launch after it cannot fail for it.
  void give(const Given&, cudaStream_t);
  void run(unsigned phases, const Conditions&, cudaStream_t);

  Outputs out{};
  int blocks = 0;  // of a launch; 0: as many as the device holds at once
  int64_t workspace_bytes() const { return bytes_; }
  int64_t host_bytes() const;  // what is held in the host's memory
  const Kernels& rule() const { return kernels_; }
  const Words& words() const { return words_; }

 private:
  void make_words();
  void fill(const Given&);
  void count_layers();
  void send(cudaStream_t);
  void range(int64_t& first, int64_t& last) const;
  void put_words(Header&, cudaStream_t);
  template <class T>
  T* place(int64_t count);
  template <int WORDS>
  cudaError_t launch(const Header&, cudaError_t (*)(const Launch<WORDS>&, int, cudaStream_t), cudaStream_t) const;

  const Kernels& kernels_;
  std::vector<int32_t> items_;  // until they are on the device
  std::vector<Row> rows_;       // likewise
  std::vector<std::vector<int64_t>> members_;  // tensors of each layer, each with the elements that are the layer's
  Words words_;
  int count_ = 0, norms_ = 0, counters_ = 0, resident_ = 0, device_ = 0;
  int64_t bytes_ = 0, workspace_ = 0;
  Tables tables_{};
  std::vector<int64_t> now_, known_;  // words as the host has them, and as the device has
  bool fresh_ = true;                 // whether the device has none yet
  bool live_ = false;                 // whether some number lives on the device
  bool leads_ = false;                // whether predicted weights are written
  Ring ring_;
};

}  // namespace layerfused::cuda
