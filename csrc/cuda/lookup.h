// What a block knows before it works on an item: the item's row, where its tensor lies, its group's scalars, and whether
// and how the step takes place. One thread looks it up for all.
#pragma once
#include "cuda/shared.h"

namespace layerfused::cuda {

// The same bytes as another type.
template <class To, class From>
DEVICE To as(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "of one size");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

template <class R, int WORDS>
class Lookup {
 protected:
  using Next = typename Shared<R>::Next;
  static constexpr int hyper = sizeof(typename R::Group) / sizeof(double);

  const Launch<WORDS>& launch;
  const Tables& at;
  Shared<R>& shared;

  DEVICE Lookup(const Launch<WORDS>& launch, Shared<R>& shared) : launch(launch), at(launch.at), shared(shared) {}

  // One thread does what a block does once.
  DEVICE static bool speaks() { return device::thread() == 0; }

  // What the host says

  DEVICE int64_t word(int64_t i) const {
    const int64_t k = i - launch.first;
    return k >= 0 && k < launch.sent ? launch.word[k] : at.words[i];
  }
  DEVICE double number(int64_t k) const {
    if (launch.live) {
      const int64_t place = word(launch.words.place(k));
      if (place & 1) return *reinterpret_cast<const double*>(place - 1);  // an odd address is one of float64
      if (place) return *reinterpret_cast<const float*>(place);
    }
    return as<double>(word(launch.words.number(k)));
  }
  // Where a chunk lies. Once for the block: each thread's registers are for elements.
  DEVICE void locate(Places& places, Row& row) const {
    const Words& w = launch.words;
    const int64_t where[Places::OTHER] = {w.p(row.tensor), w.gradient(row.tensor), w.m(row.tensor), w.v(row.tensor),
                                          w.predicted(row.tensor)};
    const int64_t types = word(w.types(row.tensor)), p = types & 255;
    const bool master = way_of(p) == MASTER;
    int64_t tensors[Places::OPERANDS] = {};
#pragma unroll
    for (int k = 0; k < Places::OTHER; ++k) tensors[k] = word(where[k]);
    places.there = tensors[1] != 0;
    if (has_rest(p)) tensors[Places::OTHER] = word(w.rest(row.tensor));
    if (master) {  // p is read and written there; what lies at p is a copy
      const int64_t copy = tensors[0];
      tensors[0] = tensors[Places::OTHER], tensors[Places::OTHER] = copy;
    }
    unsigned vectors = 0, plain = 0;
#pragma unroll
    for (int k = 0; k < Places::OPERANDS; ++k) {
      uint32_t code = types >> (8 * (k % 4)) & 255;  // the fifth's is p's
      if (k == 0 && master) code = FP32 | MASTER << 2;
      if (k == Places::OTHER) code = type_of(p);
      const uint32_t size = size_of(code);
      const int64_t address = tensors[k] + row.start * size;
      places.at[k] = reinterpret_cast<char*>(address), places.storage[k] = code;
      const unsigned fits = (uint64_t(address) & (QUAD * size - 1)) == 0;
      vectors |= fits << k, plain |= (code == FP32 ? fits : 0) << k;
    }
    places.vectors = vectors, places.plain = plain;
    if (!places.there && launch.phases != PREDICT) row.count = 0;
    if (launch.words.ways) locate_noise(places, row);
  }
  DEVICE void locate_noise(Places& places, const Row& row) const {
    const Words& w = launch.words;
    places.first = row.start;
    places.seed = word(w.noise_seed(row.tensor)), places.place = word(w.noise_place(row.tensor));
  }

  // All that is known of an item before it is begun.
  DEVICE void look_up(Next& next, int ticket) const {
    next.item = ticket < (launch.phases == NORM ? launch.norms : launch.items) ? at.items[ticket] : NONE;
    if (next.item == NONE) return;
    next.row = at.rows[next.item / 4];
    locate(next.places, next.row);
    next.time = double(at.step[next.row.tensor]) + (launch.phases == PREDICT ? 0 : 1);
    next.places.time = uint32_t(next.time);
    if (next.time == 0) next.row.count = 0;  // before the first step there is nothing to predict
    if (Kind(next.item % 4) == Kind::norm) return;
    auto& started = next.started[next.row.group % STARTED];
    if (started.group != next.row.group || started.time != next.time) start(started, next);
  }

  DEVICE void start(typename Shared<R>::Started& started, const Next& next) const {
    const int64_t first = ROWS + int64_t(next.row.group) * (1 + hyper);
    started.group = next.row.group, started.time = next.time, started.sign = number(first);
    double* row = reinterpret_cast<double*>(&started.row);
#pragma unroll 1
    for (int k = 0; k < hyper; ++k) row[k] = number(first + 1 + k);
    started.scalars = R::start(started.row, next.time);
  }

  DEVICE void begin() {
    if (speaks() && (launch.phases & NORM)) wait(at.counters + NORM_READY);  // acquires the norm
    settle();
  }

  // Whether the step takes place, and by what gradients are multiplied.
  DEVICE void settle() {
    if (speaks()) {
      bool happens = !at.found_inf || *at.found_inf == 0;
      double factor = 1;
      if (launch.clip) {
        const double norm = *at.norm, most = number(MAX_NORM);
        happens = happens && norm < INFINITY;  // NaN neither
        factor = norm > most ? most / norm : 1;
      }
      if (at.grad_scale) factor /= double(*at.grad_scale);
      shared.happens = happens, shared.factor = factor, shared.ahead = float(number(AHEAD));
    }
    device::barrier();  // publishes them to the block
  }

  // What a gradient is multiplied with: its sign, the clip's factor, and what undoes the loss scale.
  DEVICE float scale(const Next& next) const { return float(next.own().sign * shared.factor); }

  DEVICE static void wait(const uint32_t* flag) {
    while (!device::published(flag)) device::pause();
  }
};

}  // namespace layerfused::cuda
