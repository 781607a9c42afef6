#include "cpu/engine.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>

#include "cpu/loops.h"
#include "cpu/threads.h"

namespace layerfused {
namespace {

constexpr double INFINITE = std::numeric_limits<double>::infinity();

const Kernels& find(const std::string& name) {
  for (const Kernels* rule : rules())
    if (name == rule->name) return *rule;
  throw std::invalid_argument("the CPU engine has no rule named '" + name + "'");
}

Lanes empty_lanes() {
  Lanes lanes{};
  for (auto& row : lanes.least) std::fill(row, row + LANES, std::numeric_limits<float>::infinity());
  return lanes;
}

// Pairs of neighbours, again and again: the order of additions depends on the number of terms alone.
template <class Term>
double sum_tree(int64_t lo, int64_t hi, Term&& term) {
  if (hi - lo == 1) return term(lo);
  const int64_t middle = lo + (hi - lo + 1) / 2;
  return sum_tree(lo, middle, term) + sum_tree(middle, hi, term);
}

alignas(64) float zeros[TILE] = {};  // what a sweep sees of an operand that it does not read

// One operand of a chunk, tile by tile: fp32 in place, other types through a buffer, an operand not read as zeros.
struct Window {
  char* at = nullptr;
  int64_t storage = FP32;
  bool read = false, written = false;
  float* buffer = nullptr;

  float* open(int64_t n) {
    if (!at) return zeros;
    if (storage == FP32) return reinterpret_cast<float*>(at);
    to_float(buffer, at, storage, n);
    return buffer;
  }
  void close(int64_t n) {
    if (!at) return;
    if (written && storage != FP32) from_float(at, buffer, storage, n);
    at += n * size_of(storage);
  }
};

}  // namespace

std::vector<const Kernels*>& rules() {
  static std::vector<const Kernels*> all;
  return all;
}

Engine::Engine(const std::string& rule, std::vector<Item> items, std::vector<Chunk> chunks, std::vector<Layer> layers,
               int64_t tensors)
    : kernels_(find(rule)), items_(std::move(items)), chunks_(std::move(chunks)), layers_(std::move(layers)),
      first_chunk_(tensors, -1), tensors_(tensors), partials_(chunks_.size() * kernels_.stats()),
      scalars_(layers_.size()), arrivals_(new Arrivals[layers_.size()]) {
  for (int64_t c = int64_t(chunks_.size()) - 1; c >= 0; --c) first_chunk_.at(chunks_[c].tensor) = c;
  const auto is_norm = [](const Item& item) { return item.kind == Kind::norm; };
  if (std::any_of(items_.begin(), items_.end(), is_norm)) norm_partials_.resize(chunks_.size());
}

int64_t Engine::workspace_bytes() const {
  return int64_t(items_.size() * sizeof(Item) + chunks_.size() * sizeof(Chunk) +
                 layers_.size() * (sizeof(Layer) + sizeof(Scalars) + sizeof(Arrivals)) +
                 (partials_.size() + norm_partials_.size()) * 8 + first_chunk_.size() * 8 + tensors_ * 8 * 8);
}

bool Engine::run(unsigned phases, const double* groups, double max_norm, int threads) {
  phases_ = phases, groups_ = groups, max_norm_ = max_norm;
  factor_ = 1, skip_ = false;
  if (max_norm > 0 && !(phases & NORM)) clip();
  if (phases == FINISH)
    finish_phase();
  else
    run_team(threads, [this] { work(); });
  if ((phases & APPLY) && !skip_) advance();
  for (size_t l = 0; l < layers_.size(); ++l) arrivals_[l].count = 0, arrivals_[l].ready = false;
  norm_arrivals_.count = 0, norm_arrivals_.ready = false;
  ticket_ = 0;
  return !skip_;
}

// Items are claimed in order, so that whatever an item waits for has been claimed: no deadlock for any team.
void Engine::work() {
  const int64_t items = int64_t(items_.size());
  Started started;
  for (int64_t i; (i = ticket_.fetch_add(1, std::memory_order_relaxed)) < items;) run_item(items_[i], started);
}

void Engine::run_item(const Item& item, Started& started) {
  if (item.kind == Kind::norm) {
    if (phases_ & NORM) norm_chunk(chunks_[item.index], item.index);
    return;
  }
  if (phases_ == NORM) return;
  if (phases_ & NORM) {  // acquires factor_ and skip_
    wait_until([this] { return norm_arrivals_.ready.load(std::memory_order_acquire); });
  }
  if (skip_) return;
  if (item.kind == Kind::whole) {
    const Layer& layer = layers_[item.index];
    const int64_t last = layer.first + layer.chunks - 1;
    if (phases_ & REDUCE) {
      for (int64_t c = layer.first; c <= last; ++c) reduce_chunk(chunks_[c], c, started);
      combine(item.index);
    }
    if (phases_ & FINISH) finish(item.index, started);
    if (phases_ & APPLY)
      for (int64_t c = last; c >= layer.first; --c) apply_chunk(chunks_[c]);  // the last is still in cache
    return;
  }
  const Chunk& chunk = chunks_[item.index];
  const Layer& layer = layers_[chunk.layer];
  Arrivals& arrivals = arrivals_[chunk.layer];
  if (item.kind == Kind::reduce && (phases_ & REDUCE)) {
    reduce_chunk(chunk, item.index, started);
    // releases this chunk's partials (and moments), acquires everybody's for the last to arrive
    if (arrivals.count.fetch_add(1, std::memory_order_acq_rel) + 1 < layer.chunks) return;
    combine(chunk.layer);
    if (phases_ & FINISH) finish(chunk.layer, started);
    arrivals.ready.store(true, std::memory_order_release);  // publishes stats and scalars to `apply`
  } else if (item.kind == Kind::apply && (phases_ & APPLY)) {
    if (!has_stats(layer)) return apply_elementwise(chunk, started);
    if (phases_ & REDUCE) wait_until([&] { return arrivals.ready.load(std::memory_order_acquire); });
    apply_chunk(chunk);
  }
}

// Elements whose tensor has a gradient, -1 if no tensor of the layer has one: a member without adds nothing.
int64_t Engine::live_elements(const Layer& layer) const {
  int64_t elements = -1;
  for (int64_t c = layer.first; c < layer.first + layer.chunks; ++c)
    if (g.address[chunks_[c].tensor]) elements = std::max<int64_t>(elements, 0) + chunks_[c].count;
  return elements;
}

double Engine::time(const Layer& layer) const { return double(out.step[chunks_[layer.first].tensor]) + 1; }

const Scalars& Engine::start(const Layer& layer, Started& started) const {
  if (started.group != group(layer) || started.t != time(layer)) {
    started.group = group(layer), started.t = time(layer);
    kernels_.start(started.group, started.t, started.scalars);
  }
  return started.scalars;
}

template <class Run>
void Engine::sweep(const Chunk& chunk, Sweep operands, Run&& run) {
  alignas(64) float buffers[4][TILE];  // no page of it is touched unless an operand has 16 bits
  const Column* columns[4] = {&p, &g, &m, &v};
  Window all[4];
  for (int k = 0; k < 4; ++k) {
    Window& one = all[k];
    one.read = operands.reads & (1u << k), one.written = operands.writes & (1u << k);
    if (!one.read && !one.written) continue;
    one.buffer = buffers[k];
    one.storage = columns[k]->storage[chunk.tensor];
    one.at = reinterpret_cast<char*>(columns[k]->address[chunk.tensor]) + chunk.start * size_of(one.storage);
  }
  for (int64_t done = 0; done < chunk.count; done += TILE) {
    const int64_t n = std::min(TILE, chunk.count - done);
    run(Tile{all[0].open(n), all[1].open(n), all[2].open(n), all[3].open(n)}, n);
    for (auto& one : all) one.close(n);
  }
}

void Engine::norm_chunk(const Chunk& chunk, int64_t slot) {
  double lanes[LANES] = {};
  if (g.address[chunk.tensor])
    sweep(chunk, {G, 0}, [&](const Tile& tile, int64_t n) { add_squares(lanes, tile.g, n); });
  norm_partials_[slot] = sum_tree(0, LANES, [&](int64_t j) { return lanes[j]; });
  if (norm_arrivals_.count.fetch_add(1, std::memory_order_acq_rel) + 1 < int64_t(chunks_.size())) return;
  *out.norm = std::sqrt(sum_tree(0, int64_t(chunks_.size()), [&](int64_t c) { return norm_partials_[c]; }));
  clip();
  norm_arrivals_.ready.store(true, std::memory_order_release);  // publishes factor_ and skip_
}

// A norm that is not finite turns the step into one that changes nothing.
void Engine::clip() {
  const double norm = *out.norm;
  skip_ = !(norm < INFINITE);
  factor_ = norm > max_norm_ ? max_norm_ / norm : 1;
}

void Engine::reduce_chunk(const Chunk& chunk, int64_t slot, Started& started) {
  const Layer& layer = layers_[chunk.layer];
  Lanes lanes = empty_lanes();
  if (g.address[chunk.tensor]) {
    const Scalars& c = start(layer, started);
    Sweep operands = kernels_.reduce_sweep;
    if (kernels_.coupled(c) != 0) operands.reads |= P;
    const float factor = scale(layer);
    sweep(chunk, operands, [&](const Tile& tile, int64_t n) { kernels_.reduce(c, factor, tile, n, lanes); });
  }
  double* partial = &partials_[slot * kernels_.stats()];
  for (int k = 0; k < kernels_.sums; ++k) partial[k] = sum_tree(0, LANES, [&](int64_t j) { return lanes.sum[k][j]; });
  for (int k = 0; k < kernels_.minima; ++k)
    partial[kernels_.sums + k] = *std::min_element(lanes.least[k], lanes.least[k] + LANES);
}

void Engine::combine(int64_t index) {
  const Layer& layer = layers_[index];
  const int stats = kernels_.stats();
  double* total = out.stats + index * stats;
  const double* partials = partials_.data();
  for (int k = 0; k < stats; ++k) {
    const auto term = [&](int64_t c) { return partials[c * stats + k]; };
    if (k < kernels_.sums) {
      total[k] = sum_tree(layer.first, layer.first + layer.chunks, term);
    } else {
      total[k] = INFINITE;
      for (int64_t c = layer.first; c < layer.first + layer.chunks; ++c) total[k] = std::min(total[k], term(c));
    }
  }
}

void Engine::finish(int64_t index, Started& started) {
  const Layer& layer = layers_[index];
  const int64_t elements = live_elements(layer);
  if (elements < 0) return;
  double* state = out.state ? out.state + layer.state : nullptr;
  const Total total{out.stats + index * kernels_.stats(), double(elements), time(layer), has_stats(layer), state,
                    out.report + index * kernels_.reports};
  Scalars& c = scalars_[index];
  c = start(layer, started);
  kernels_.finish(group(layer), total, c);
  for (int64_t k = 1; state && k < layer.states; ++k) state[k] = *state;  // alike in every member of the layer
}

void Engine::finish_phase() {
  DefaultFloats floats;
  Started started;
  for (size_t l = 0; l < layers_.size(); ++l)
    if (has_stats(layers_[l])) finish(int64_t(l), started);
}

void Engine::apply_chunk(const Chunk& chunk) {
  if (!g.address[chunk.tensor]) return;
  const Scalars& c = scalars_[chunk.layer];
  const float factor = scale(layers_[chunk.layer]);
  sweep(chunk, kernels_.apply_sweep, [&](const Tile& tile, int64_t n) { kernels_.apply(c, factor, tile, n); });
}

// A layer without stats has nothing to wait for: each of its chunks finishes for itself.
void Engine::apply_elementwise(const Chunk& chunk, Started& started) {
  if (!g.address[chunk.tensor]) return;
  const Layer& layer = layers_[chunk.layer];
  double ignored[MAX_REPORTS];
  double* report = &chunk == &chunks_[layer.first] ? out.report + chunk.layer * kernels_.reports : ignored;
  double* state = out.state ? out.state + layer.state : nullptr;
  Scalars c = start(layer, started);
  kernels_.finish(group(layer), {nullptr, double(layer.elements), time(layer), false, state, report}, c);
  const float factor = scale(layer);
  sweep(chunk, kernels_.both_sweep(), [&](const Tile& tile, int64_t n) { kernels_.both(c, factor, tile, n); });
}

// A step counts for all tensors of a layer as soon as one of them had a gradient.
void Engine::advance() {
  for (int64_t tensor = 0; tensor < tensors_; ++tensor)
    if (first_chunk_[tensor] >= 0 && live_elements(layers_[chunks_[first_chunk_[tensor]].layer]) >= 0)
      out.step[tensor] += 1;
}

}  // namespace layerfused
