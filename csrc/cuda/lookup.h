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
    const int64_t where[Places::OPERANDS] = {w.p(row.tensor), w.gradient(row.tensor), w.m(row.tensor), w.v(row.tensor),
                                             w.predicted(row.tensor)};
    const int64_t types = word(w.types(row.tensor));
    unsigned vectors = 0, plain = 0;
#pragma unroll
    for (int k = 0; k < Places::OPERANDS; ++k) {
      const uint32_t storage = types >> (8 * (k % 4)) & 255, size = storage == FP32 ? 4 : 2;  // the fifth's is p's
      const int64_t tensor = word(where[k]), address = tensor + row.start * size;
      if (k == 1) places.there = tensor != 0;
      places.at[k] = reinterpret_cast<char*>(address), places.storage[k] = storage;
      const unsigned fits = (uint64_t(address) & (QUAD * size - 1)) == 0;
      vectors |= fits << k, plain |= (storage == FP32 ? fits : 0) << k;
    }
    places.vectors = vectors, places.plain = plain;
    if (!places.there && launch.phases != PREDICT) row.count = 0;
  }

  // All that is known of an item before it is begun.
  DEVICE void look_up(Next& next, int ticket) const {
    next.item = ticket < (launch.phases == NORM ? launch.norms : launch.items) ? at.items[ticket] : NONE;
    if (next.item == NONE) return;
    next.row = at.rows[next.item / 4];
    locate(next.places, next.row);
    next.time = double(at.step[next.row.tensor]) + (launch.phases == PREDICT ? 0 : 1);
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
