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

void clear(Lanes& lanes, const Kernels& rule) {
  for (int k = 0; k < rule.sums; ++k) std::fill(lanes.sum[k], lanes.sum[k] + LANES, 0.0);
  for (int k = 0; k < rule.minima; ++k) std::fill(lanes.least[k], lanes.least[k] + LANES, float(INFINITE));
}

// The upper half of the lanes onto the lower, again and again.
double fold(const double (&lanes)[LANES]) {
  double sum[LANES];
  std::copy(lanes, lanes + LANES, sum);
  for (int half = LANES / 2; half > 0; half /= 2)
    for (int j = 0; j < half; ++j) sum[j] += sum[j + half];
  return sum[0];
}

// Halves of a range, again and again: the order of additions depends on the number of terms alone.
template <class Term>
double sum_tree(int64_t lo, int64_t hi, Term&& term) {
  if (hi - lo == 1) return term(lo);
  const int64_t middle = lo + (hi - lo + 1) / 2;
  return sum_tree(lo, middle, term) + sum_tree(middle, hi, term);
}

}  // namespace

std::vector<const Kernels*>& rules() {
  static std::vector<const Kernels*> all;
  return all;
}

Engine::Engine(const std::string& rule, std::vector<Item> items, std::vector<Chunk> chunks, std::vector<Layer> layers,
               int64_t tensors)
    : kernels_(find(rule)), items_(std::move(items)), chunks_(std::move(chunks)), layers_(std::move(layers)),
      first_chunk_(tensors, -1), tensors_(tensors), partials_(chunks_.size() * kernels_.stats()),
      scalars_(layers_.size()), arrivals_(new Arrivals[layers_.size()]), taken_(new std::atomic<bool>[chunks_.size()]()) {
  for (int64_t c = int64_t(chunks_.size()) - 1; c >= 0; --c) first_chunk_.at(chunks_[c].tensor) = c;
  const auto is_norm = [](const Item& item) { return item.kind == Kind::norm; };
  if (std::any_of(items_.begin(), items_.end(), is_norm)) norm_partials_.resize(chunks_.size());
}

int64_t Engine::workspace_bytes() const {
  return int64_t(items_.size() * sizeof(Item) + chunks_.size() * sizeof(Chunk) +
                 layers_.size() * (sizeof(Layer) + sizeof(Scalars) + sizeof(Arrivals)) +
                 (partials_.size() + norm_partials_.size() + first_chunk_.size()) * 8 + chunks_.size() +
                 tensors_ * (ways.rest ? 7 : 4) * 8);
}

bool Engine::run(unsigned phases, const double* groups, double max_norm, int threads) {
  if ((phases & NORM) && norm_partials_.empty() && !chunks_.empty())
    throw std::invalid_argument("the plan was made without items for the gradient norm");
  reset();
  phases_ = phases, groups_ = groups, max_norm_ = max_norm;
  factor_ = 1, skip_ = false;
  if (max_norm > 0 && !(phases & NORM)) clip();
  if ((phases & FINISH) && !(phases & REDUCE) && !skip_) finish_phase();
  if (phases != FINISH) run_team(threads, [this] { work(); });
  if ((phases & APPLY) && !skip_) advance();
  return !skip_;
}

// At the head of a run, so that whatever became of the one before leaves nothing behind.
void Engine::reset() {
  for (size_t l = 0; l < layers_.size(); ++l) arrivals_[l].count = 0, arrivals_[l].ready = false;
  for (size_t c = 0; c < chunks_.size(); ++c) taken_[c].store(false, std::memory_order_relaxed);
  norm_arrivals_.count = 0, norm_arrivals_.ready = false;
  ticket_ = 0;
}

// Items are claimed in order and begun in that order, so that the first item not begun waits for none but begun ones.
void Engine::work() {
  Worker worker;
  const int64_t items = int64_t(items_.size());
  for (int64_t i; (i = ticket_.fetch_add(1, std::memory_order_relaxed)) < items;) run_item(items_[i], worker);
}

void Engine::run_item(const Item& item, Worker& worker) {
  if (item.kind == Kind::norm) {
    if (phases_ & NORM) norm_chunk(chunks_[item.index], item.index);
    return;
  }
  if (phases_ == NORM) return;
  if (phases_ & PREDICT) return predict_item(item);
  if (phases_ & NORM) {  // acquires factor_ and skip_
    wait_until([this] { return norm_arrivals_.ready.load(std::memory_order_acquire); });
  }
  if (skip_) return;
  if (item.kind == Kind::whole) return run_whole(item.index, worker);
  const Chunk& chunk = chunks_[item.index];
  const Layer& layer = layers_[chunk.layer];
  Arrivals& arrivals = arrivals_[chunk.layer];
  if (item.kind == Kind::reduce && (phases_ & REDUCE)) {
    reduce_chunk(chunk, item.index, worker);
    worker.reduced.push_back(item.index);
    // releases this chunk's partials (and moments), acquires everybody's for the last to arrive
    if (arrivals.count.fetch_add(1, std::memory_order_acq_rel) + 1 < layer.chunks) return;
    combine(chunk.layer);
    if (phases_ & FINISH) finish(chunk.layer, worker.started);
    arrivals.ready.store(true, std::memory_order_release);  // publishes stats and scalars to `apply`
  } else if (item.kind == Kind::apply && (phases_ & APPLY)) {
    if (!has_stats(layer)) return apply_elementwise(chunk, worker);
    if (phases_ & REDUCE) wait_until([&] { return arrivals.ready.load(std::memory_order_acquire); });
    // without a reduce before it no chunk is in anybody's cache
    apply_chunk(phases_ & REDUCE ? chunks_[take(chunk.layer, worker)] : chunk);
  }
}

void Engine::run_whole(int64_t index, Worker& worker) {
  const Layer& layer = layers_[index];
  const int64_t last = layer.first + layer.chunks - 1;
  if (phases_ & REDUCE) {
    for (int64_t c = layer.first; c <= last; ++c) reduce_chunk(chunks_[c], c, worker);
    combine(index);
    if (phases_ & FINISH) finish(index, worker.started);
  }
  if (phases_ & APPLY)  // backwards: the last is still in cache
    for (int64_t c = last; c >= layer.first; --c) apply_chunk(chunks_[c]);
}

// Which chunk of a finished layer to apply: of those that this worker reduced itself the last, for it lies in the
// worker's own cache, else any. The layer has as many items as chunks, and each chunk is taken once.
int64_t Engine::take(int64_t index, Worker& worker) {
  const auto free = [this](int64_t c) { return !taken_[c].exchange(true, std::memory_order_relaxed); };
  auto& mine = worker.reduced;
  for (size_t k = mine.size(); k-- > 0 && chunks_[mine[k]].layer >= index;) {
    if (chunks_[mine[k]].layer > index) continue;  // of a layer that was looked ahead at
    const int64_t c = mine[k];
    mine.erase(mine.begin() + int64_t(k));
    if (free(c)) return c;
  }
  const Layer& layer = layers_[index];
  int64_t c = layer.first + layer.chunks - 1;
  while (!free(c)) c = c > layer.first ? c - 1 : layer.first + layer.chunks - 1;
  return c;
}

// Elements whose tensor has a gradient, -1 if no tensor of the layer has one: a member without adds nothing.
int64_t Engine::live_elements(const Layer& layer) const {
  int64_t elements = -1;
  for (int64_t c = layer.first; c < layer.first + layer.chunks; ++c)
    if (g.address[chunks_[c].tensor]) elements = std::max<int64_t>(elements, 0) + chunks_[c].elements;
  return elements;
}

// The number of the step at hand; of the last one where no step is under way.
double Engine::time(const Layer& layer) const {
  return double(out.step[chunks_[layer.first].tensor]) + (phases_ == PREDICT ? 0 : 1);
}

const Scalars& Engine::start(const Layer& layer, Started& started) const {
  if (started.group != group(layer) || started.t != time(layer)) {
    started.group = group(layer), started.t = time(layer);
    kernels_.start(started.group, started.t, started.scalars);
  }
  return started.scalars;
}

template <class Run>
void Engine::sweep(const Chunk& chunk, Sweep operands, Run&& run) const {
  const auto t = uint32_t(time(layers_[chunk.layer]));
  Pass pass({&p, &g, &m, &v, &predicted}, ways, chunk, operands, t);
  while (pass.left() > 0) {
    run(pass.open(), pass);
    pass.close();
  }
}

// A prediction starts from what is stored, so that it is the same bits when it is made from memory later.
void Engine::update(const Chunk& chunk, Sweep operands, Update plain, Update leading, const Scalars& c) const {
  const float factor = scale(layers_[chunk.layer]);
  if (!leads()) return sweep(chunk, operands, [&](const Stretch& x, const Pass&) { plain(c, factor, 0, x); });
  operands.writes |= PREDICTED;
  sweep(chunk, operands, [&](const Stretch& x, const Pass& pass) {
    const bool wide = pass.storage(0) == FP32 && pass.storage(2) == FP32 && pass.storage(3) == FP32;
    if (wide) return leading(c, factor, ahead, x);
    plain(c, factor, 0, x);
    round_as_stored(x.tile.p, pass.storage(0), x.n);
    if (operands.writes & M) round_as_stored(x.tile.m, pass.storage(2), x.n);
    if (operands.writes & V) round_as_stored(x.tile.v, pass.storage(3), x.n);
    kernels_.predict(c, ahead, x);
  });
}

void Engine::predict_item(const Item& item) const {
  if (skip_) return;
  if (item.kind == Kind::apply) predict_chunk(chunks_[item.index]);
  if (item.kind != Kind::whole) return;
  const Layer& layer = layers_[item.index];
  for (int64_t c = layer.first; c < layer.first + layer.chunks; ++c) predict_chunk(chunks_[c]);
}

// From the last step's numbers; before the first there is nowhere to go.
void Engine::predict_chunk(const Chunk& chunk) const {
  const Layer& layer = layers_[chunk.layer];
  if (time(layer) == 0 || ((phases_ & UNCOUNTED) && !g.address[chunk.tensor])) return;
  double* state = out.state ? out.state + layer.state : nullptr;
  Scalars c;
  kernels_.start(group(layer), time(layer), c);
  kernels_.recall(group(layer), {nullptr, double(layer.elements), time(layer), has_stats(layer), state,
                                 out.report + chunk.layer * kernels_.reports}, c);
  sweep(chunk, {kernels_.predict_reads, PREDICTED},
        [&](const Stretch& x, const Pass&) { kernels_.predict(c, ahead, x); });
}

void Engine::norm_chunk(const Chunk& chunk, int64_t slot) {
  double lanes[LANES] = {};
  if (g.address[chunk.tensor])
    sweep(chunk, {G, 0}, [&](const Stretch& stretch, const Pass&) { add_squares(lanes, stretch.tile.g, stretch.n); });
  norm_partials_[slot] = fold(lanes);
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

void Engine::reduce_chunk(const Chunk& chunk, int64_t slot, Worker& worker) {
  const Layer& layer = layers_[chunk.layer];
  Lanes lanes;
  clear(lanes, kernels_);
  if (g.address[chunk.tensor]) {
    const Scalars& c = start(layer, worker.started);
    Sweep operands = kernels_.reduce_sweep;
    if (kernels_.coupled(c) != 0) operands.reads |= P;
    const float factor = scale(layer);
    sweep(chunk, operands, [&](const Stretch& stretch, const Pass&) { kernels_.reduce(c, factor, stretch, lanes); });
  }
  double* partial = &partials_[slot * kernels_.stats()];
  for (int k = 0; k < kernels_.sums; ++k) partial[k] = fold(lanes.sum[k]);
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
  update(chunk, kernels_.apply_sweep, kernels_.apply, kernels_.apply_leading, scalars_[chunk.layer]);
}

// A layer without stats has nothing to wait for: each of its chunks finishes for itself.
void Engine::apply_elementwise(const Chunk& chunk, Worker& worker) {
  if (!g.address[chunk.tensor]) return;
  const Layer& layer = layers_[chunk.layer];
  double ignored[MAX_REPORTS];
  double* report = &chunk == &chunks_[layer.first] ? out.report + chunk.layer * kernels_.reports : ignored;
  double* state = out.state ? out.state + layer.state : nullptr;
  Scalars c = start(layer, worker.started);
  kernels_.finish(group(layer), {nullptr, double(layer.elements), time(layer), false, state, report}, c);
  update(chunk, kernels_.both_sweep(), kernels_.both, kernels_.both_leading, c);
}

// A step counts for all tensors of a layer as soon as one of them had a gradient.
void Engine::advance() {
  for (const Layer& layer : layers_) {
    if (live_elements(layer) < 0) continue;
    for (int64_t c = layer.first; c < layer.first + layer.chunks; ++c)
      if (first_chunk_[chunks_[c].tensor] == c) out.step[chunks_[c].tensor] += 1;
  }
}

}  // namespace layerfused
