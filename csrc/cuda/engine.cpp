#include "cuda/engine.h"

#include <algorithm>
#include <cstring>

#define PLAN "copy the plan to the device"
#define WARM_UP "take one step with these parameters and groups before the capture"

namespace layerfused::cuda {
namespace {

const Kernels& find(const std::string& name) {
  for (const Kernels* rule : rules())
    if (name == rule->name) return *rule;
  throw std::invalid_argument("the CUDA engine has no rule named '" + name + "'");
}

int32_t narrow(int64_t x, const char* what) {
  if (x < 0 || x > INT32_MAX) throw std::length_error(std::string("too many ") + what + " for one launch");
  return int32_t(x);
}

int64_t bits_of(double x) {
  int64_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

bool in_capture(cudaStream_t stream) {
  cudaStreamCaptureStatus capture;
  check(cudaStreamIsCapturing(stream, &capture), "ask whether the stream is in capture");
  return capture != cudaStreamCaptureStatusNone;
}

}  // namespace

std::vector<const Kernels*>& rules() {
  static std::vector<const Kernels*> all;
  return all;
}

Engine::Engine(const std::string& rule, const std::vector<Item>& items, const std::vector<Chunk>& chunks,
               const std::vector<Layer>& layers, int64_t tensors, int64_t groups)
    : kernels_(find(rule)), members_(layers.size()),
      words_{tensors, int64_t(layers.size()), ROWS + groups * (1 + kernels_.hyper), 0} {
  narrow(int64_t(chunks.size()) * 4, "chunks");
  for (const Item& item : items) {
    const bool whole = item.kind == Kind::whole;  // the index is the layer's, which has one chunk
    const int64_t chunk = whole ? layers.at(item.index).first : item.index;
    if (whole && (layers[item.index].chunks != 1 || chunks.at(chunk).count > WHOLE))
      throw std::invalid_argument("a layer of more than " + std::to_string(WHOLE) + " elements does not stay on chip");
    items_.push_back(int32_t(item.kind) + 4 * int32_t(chunk));
    norms_ += item.kind == Kind::norm;
  }
  for (const Chunk& c : chunks) {
    const Layer& layer = layers.at(c.layer);
    rows_.push_back({c.start, narrow(c.count, "elements"), int32_t(c.tensor), int32_t(c.layer), int32_t(layer.group),
                     int32_t(layer.first), int32_t(layer.chunks), int32_t(layer.adapt), int32_t(layer.state),
                     int32_t(layer.states), 0});
    members_[c.layer].insert(members_[c.layer].end(), {c.tensor, c.elements});
  }
  count_ = narrow(int64_t(items_.size()), "items");
  counters_ = narrow(ARRIVED + 2 * words_.layers, "layers");
  make_words();
}

void Engine::make_words() {
  now_.resize(words_.size()), known_.resize(words_.size());
  bind(0, 0, nullptr);  // for the size of the workspace
}

void Engine::set_precision(const int64_t* rests, const int64_t* seeds, const int64_t* places) {
  words_.ways = 1;
  make_words();
  for (int64_t i = 0; i < words_.tensors; ++i) {
    now_[words_.rest(i)] = rests[i];
    now_[words_.noise_seed(i)] = seeds[i], now_[words_.noise_place(i)] = places[i];
  }
}

template <class T>
T* Engine::place(int64_t count) {
  bytes_ = (bytes_ + 127) / 128 * 128;
  T* at = reinterpret_cast<T*>(workspace_ + bytes_);
  bytes_ += count * int64_t(sizeof(T));
  return at;
}

void Engine::bind(int device, int64_t workspace, cudaStream_t stream) {
  device_ = device, workspace_ = workspace, bytes_ = 0;
  const int64_t chunks = int64_t(rows_.size());
  auto* items = place<int32_t>(int64_t(items_.size()));
  auto* rows = place<Row>(chunks);
  tables_.items = items, tables_.rows = rows;
  tables_.words = place<int64_t>(words_.size());
  tables_.counters = place<uint32_t>(counters_);
  tables_.partials = place<double>(chunks * kernels_.stats);
  tables_.norm_partials = place<double>(chunks);
  tables_.scalars = place<float>(words_.layers * MAX_SCALARS);
  if (!workspace) return;  // asked for its size only
  OnDevice guard(device);
  int multiprocessors = 0, each = 0;
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), "ask the device");
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernels_.kernel, THREADS, 0), "load the kernel");
  resident_ = std::max(1, multiprocessors * each);
  if (in_capture(stream)) throw std::runtime_error("a CUDA graph cannot capture an optimizer's first step: " WARM_UP);
  // from memory that is not pinned: both are read before the calls return
  check(cudaMemcpyAsync(items, items_.data(), items_.size() * sizeof(int32_t), cudaMemcpyHostToDevice, stream), PLAN);
  check(cudaMemcpyAsync(rows, rows_.data(), rows_.size() * sizeof(Row), cudaMemcpyHostToDevice, stream), PLAN);
  items_ = {}, rows_ = {};
}

int64_t Engine::host_bytes() const {
  size_t members = 0;
  for (const auto& layer : members_) members += layer.size() * 8 + sizeof(layer);
  return int64_t(2 * now_.size() * 8 + members + ring_.bytes());
}

void Engine::give(const Given& given, cudaStream_t stream) {
  OnDevice guard(device_);
  fill(given);
  int64_t first, last;
  range(first, last);
  if (in_capture(stream) ? first < last && last > MANY : fresh_ || last - first > MANY) send(stream);
}

void Engine::run(unsigned phases, const Conditions& conditions, cudaStream_t stream) {
  if (count_ == 0) return;
  OnDevice guard(device_);
  Header header{};
  header.at = tables_, header.words = words_;
  header.at.step = reinterpret_cast<float*>(out.step), header.at.state = reinterpret_cast<double*>(out.state);
  header.at.stats = reinterpret_cast<double*>(out.stats), header.at.report = reinterpret_cast<double*>(out.report);
  header.at.norm = reinterpret_cast<double*>(out.norm);
  header.at.skipped = reinterpret_cast<int64_t*>(conditions.skipped);
  header.at.grad_scale = reinterpret_cast<const float*>(conditions.grad_scale);
  header.at.found_inf = reinterpret_cast<const float*>(conditions.found_inf);
  header.items = count_, header.norms = norms_, header.counters = counters_;
  header.phases = phases, header.clip = conditions.clip, header.live = live_, header.leads = leads_;
  put_words(header, stream);
  const auto status =
      header.sent <= FEW ? launch(header, kernels_.few, stream) : launch(header, kernels_.many, stream);
  check(status, "launch the step");
  if (header.keep) known_ = now_;
}

// What the host says of this step, as words.
void Engine::fill(const Given& given) {
  bool changed = fresh_;
  for (int64_t i = 0; i < words_.tensors; ++i) {
    const int64_t* row = given.addresses + 4 * i;
    int64_t& gradient = now_[words_.gradient(i)];
    changed |= (gradient != 0) != (row[1] != 0);
    gradient = row[1];
    now_[words_.p(i)] = row[0], now_[words_.m(i)] = row[2], now_[words_.v(i)] = row[3];
    now_[words_.predicted(i)] = given.predicted ? given.predicted[i] : 0;
    int64_t& types = now_[words_.types(i)];
    types = (types & int64_t(1) << 32) | given.types[i];
  }
  for (int64_t k = 0; k < words_.numbers; ++k)
    now_[words_.number(k)] = given.places[k] ? 0 : bits_of(given.numbers[k]), now_[words_.place(k)] = given.places[k];
  live_ = std::any_of(given.places, given.places + words_.numbers, [](int64_t place) { return place != 0; });
  leads_ = given.predicted != nullptr;
  if (changed) count_layers();
}

// Elements that take part in each layer; a step counts for all of its tensors as soon as one of them has a gradient.
void Engine::count_layers() {
  for (int64_t i = 0; i < words_.tensors; ++i) now_[words_.types(i)] &= ~(int64_t(1) << 32);
  for (int64_t l = 0; l < words_.layers; ++l) {
    const auto& members = members_[l];
    int64_t elements = -1;
    for (size_t k = 0; k < members.size(); k += 2)
      if (now_[words_.gradient(members[k])]) elements = std::max<int64_t>(elements, 0) + members[k + 1];
    now_[words_.elements(l)] = elements;
    for (size_t k = 0; elements >= 0 && k < members.size(); k += 2)
      now_[words_.types(members[k])] |= int64_t(1) << 32;
  }
}

// The words that the device has not, from the first to behind the last.
void Engine::range(int64_t& first, int64_t& last) const {
  first = 0, last = words_.size();
  while (first < last && now_[first] == known_[first]) ++first;
  while (last > first && now_[last - 1] == known_[last - 1]) --last;
}

// All words, by a copy.
void Engine::send(cudaStream_t stream) {
  if (in_capture(stream))
    throw std::runtime_error(
        "the optimizer's tables changed since the last step by more than a CUDA graph can carry: " WARM_UP);
  fresh_ = true;  // until the copy is on its way
  ring_.copy(tables_.words, now_.data(), now_.size() * sizeof(int64_t), stream);
  fresh_ = false, known_ = now_;
}

// The words that changed go with the launch. A launch in capture takes along all that fits, for itself alone: so what
// eager steps send does not reach its replays, nor what it carries eager steps.
void Engine::put_words(Header& header, cudaStream_t stream) {
  int64_t first, last;
  range(first, last);
  const bool captured = in_capture(stream);
  if (captured) first = 0, last = std::min<int64_t>(words_.size(), MANY);
  header.first = int32_t(first), header.sent = int32_t(last - first);
  header.keep = !captured && header.sent > 0;
}

template <int WORDS>
cudaError_t Engine::launch(const Header& header, cudaError_t (*start)(const Launch<WORDS>&, int, cudaStream_t),
                           cudaStream_t stream) const {
  Launch<WORDS> whole;
  static_cast<Header&>(whole) = header;
  std::copy_n(now_.begin() + header.first, header.sent, whole.word);
  const int items = header.phases == NORM ? header.norms : header.items;
  return start(whole, std::min(blocks ? blocks : resident_, std::max(items, 1)), stream);
}

}  // namespace layerfused::cuda
