// The kernel: any number of blocks run one rule over a plan, in one launch.
//
// Blocks take items in the order of their tickets, each one ahead of the item it works on. An item waits only for items
// with smaller tickets, which are some block's already, and that block's turn comes before its later ones: no deadlock
// with any number of blocks. Whoever arrives last at a layer adds up its chunks' partial stats in the order of their
// slots and finishes the layer; whoever leaves the launch last counts the steps and clears the counters, so that a
// launch can be replayed as it is. No optimizer is known here by name.
#pragma once
#include "cuda/device.h"
#include "cuda/launch.h"
#include "cuda/sums.h"
#include "cuda/tile.h"
#include "plan.h"
#include "rule.h"

namespace layerfused::cuda {

constexpr int NONE = -1, STARTED = 8;

// What `apply` reads of a layer that stays on chip. Each thread finds there what it has put there.
template <class R>
struct Stash {
  static constexpr unsigned operands = R::sums + R::minima > 0 ? R::apply_sweep.reads : 0;
  static constexpr int rows = count_of(operands);
  float kept[rows > 0 ? rows : 1][rows > 0 ? WHOLE : 1];

  DEVICE static constexpr int row(unsigned operand) { return count_of(operands & (operand - 1)); }
  DEVICE void put(const Element& x, int i) {
    if constexpr ((operands & P) != 0) kept[row(P)][i] = x.p;
    if constexpr ((operands & G) != 0) kept[row(G)][i] = x.g;
    if constexpr ((operands & M) != 0) kept[row(M)][i] = x.m;
    if constexpr ((operands & V) != 0) kept[row(V)][i] = x.v;
  }
  DEVICE Element get(int i) const {
    Element x{0, 0, 0, 0};
    if constexpr ((operands & P) != 0) x.p = kept[row(P)][i];
    if constexpr ((operands & G) != 0) x.g = kept[row(G)][i];
    if constexpr ((operands & M) != 0) x.m = kept[row(M)][i];
    if constexpr ((operands & V) != 0) x.v = kept[row(V)][i];
    return x;
  }
};

// What the threads of a block share: all that is the block's and not a thread's, for registers are short. The halves of
// a pair are used in turn: one belongs to the item at hand, the other is made ready for the next meanwhile.
template <class R>
struct Shared {
  struct Started {  // a group at one step
    int32_t group;
    double time, sign;
    typename R::Group row;
    typename R::Scalars scalars;
  };
  struct Next {
    int32_t item;
    double time;  // the number of this step, from 1
    Row row;      // its count is 0 where the tensor has no gradient: nothing of it is read, summed or written
    Places places;
    Started started[STARTED];  // groups met lately

    DEVICE const Started& own() const { return started[row.group % STARTED]; }
  } next[2];
  Stash<R> stash;
  Board board, combined;
  double stats[MAX_STATS];
  typename R::Scalars finished;
  double factor;  // of clip and loss scale
  bool happens, last;
};

// The same bytes as another type.
template <class To, class From>
DEVICE To as(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "of one size");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

template <class R, int WORDS>
class Block {
  using Scalars = typename R::Scalars;
  using Group = typename R::Group;
  using S = Stats<R::sums, R::minima>;
  static constexpr int hyper = sizeof(Group) / sizeof(double);
  static_assert(sizeof(Scalars) <= MAX_SCALARS * sizeof(float), "raise MAX_SCALARS");

  const Launch<WORDS>& launch;
  const Tables& at;
  Shared<R>& shared;
  bool began = false;  // whether the norm is known

 public:
  DEVICE Block(const Launch<WORDS>& launch, Shared<R>& shared) : launch(launch), at(launch.at), shared(shared) {}

  DEVICE void run() {
    const int first = launch.phases & NORM ? 0 : launch.norms;  // the norm's items are passed over
    if (speaks()) {
      shared.happens = true;
      for (auto& next : shared.next)
        for (auto& started : next.started) started.group = NONE;
      look_up(shared.next[0], first + int(device::take(at.counters + TICKET)));
    }
    for (int turn = 0;; turn ^= 1) {
      device::barrier();  // publishes this turn's item
      if (shared.next[turn].item == NONE) break;
      int next = 0;
      if (speaks()) next = first + int(device::take(at.counters + TICKET));  // under way meanwhile
      work_on(shared.next[turn]);
      if (!shared.happens) break;
      if (speaks()) look_up(shared.next[turn ^ 1], next);
    }
    leave();
  }

 private:
  using Next = typename Shared<R>::Next;

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
    const int64_t where[4] = {w.p(row.tensor), w.gradient(row.tensor), w.m(row.tensor), w.v(row.tensor)};
    const int64_t types = word(w.types(row.tensor));
    unsigned vectors = 0, plain = 0;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const uint32_t storage = types >> (8 * k) & 255, size = storage == FP32 ? 4 : 2;
      const int64_t tensor = word(where[k]), address = tensor + row.start * size;
      if (k == 1) places.there = tensor != 0;
      places.at[k] = reinterpret_cast<char*>(address), places.storage[k] = storage;
      const unsigned fits = (uint64_t(address) & (QUAD * size - 1)) == 0;
      vectors |= fits << k, plain |= (storage == FP32 ? fits : 0) << k;
    }
    places.vectors = vectors, places.plain = plain;
    if (!places.there) row.count = 0;
  }

  // Items

  // All that is known of an item before it is begun.
  DEVICE void look_up(Next& next, int ticket) const {
    next.item = ticket < (launch.phases == NORM ? launch.norms : launch.items) ? at.items[ticket] : NONE;
    if (next.item == NONE) return;
    next.row = at.rows[next.item / 4];
    locate(next.places, next.row);
    next.time = double(at.step[next.row.tensor]) + 1;
    if (Kind(next.item % 4) == Kind::norm) return;
    auto& started = next.started[next.row.group % STARTED];
    if (started.group != next.row.group || started.time != next.time) start(started, next);
  }

  DEVICE void start(typename Shared<R>::Started& started, const Next& next) const {
    const int64_t first = 1 + int64_t(next.row.group) * (1 + hyper);
    started.group = next.row.group, started.time = next.time, started.sign = number(first);
    double* row = reinterpret_cast<double*>(&started.row);
#pragma unroll 1
    for (int k = 0; k < hyper; ++k) row[k] = number(first + 1 + k);
    started.scalars = R::start(started.row, next.time);
  }

  DEVICE void work_on(const Next& next) {
    const Kind kind = Kind(next.item % 4);
    if (kind == Kind::norm) return norm_chunk(next);
    if (!began) begin();
    if (!shared.happens) return;
    if (S::count == 0 || !next.row.adapt) {
      if (launch.phases & APPLY) apply_elementwise(next);
    } else if constexpr (S::count > 0) {
      work_on_layer(next, kind);
    }
  }

  DEVICE void work_on_layer(const Next& next, Kind kind) {
    constexpr unsigned all = REDUCE | FINISH | APPLY;
    const bool on_chip = kind == Kind::whole && (launch.phases & all) == all;
    bool complete = false;  // whether this block has the stats of the whole layer before it
    if (launch.phases == FINISH) complete = kind != Kind::apply && recall(next);
    else if (on_chip) complete = reduce_on_chip(next);
    else if (kind != Kind::apply && (launch.phases & REDUCE)) complete = reduce_chunk(next);
    if (complete && speaks()) {
      if (launch.phases & FINISH) finish(next);
      // the layer's scalars, and with them everybody's moments, to `apply`
      if (!on_chip) device::publish(ready(next));
    }
    if (on_chip) apply_on_chip(next);
    else if (kind != Kind::reduce && (launch.phases & APPLY)) apply_chunk(next);
  }

  DEVICE void begin() {
    began = true;
    if (speaks() && (launch.phases & NORM)) wait(at.counters + NORM_READY);  // acquires the norm
    settle();
  }

  // Whether the step takes place, and by what gradients are multiplied.
  DEVICE void settle() {
    if (speaks()) {
      bool happens = !at.found_inf || *at.found_inf == 0;
      double factor = 1;
      if (launch.clip) {
        const double norm = *at.norm, most = number(0);
        happens = happens && norm < INFINITY;  // NaN neither
        factor = norm > most ? most / norm : 1;
      }
      if (at.grad_scale) factor /= double(*at.grad_scale);
      shared.happens = happens, shared.factor = factor;
    }
    device::barrier();  // publishes them to the block
  }

  // What a gradient is multiplied with: its sign, the clip's factor, and what undoes the loss scale.
  DEVICE float scale(const Next& next) const { return float(next.own().sign * shared.factor); }

  DEVICE static void wait(const uint32_t* flag) {
    while (!device::published(flag)) device::pause();
  }

  // A gradient as rules see it: with its sign, clipped, with coupled decay.
  DEVICE static void prepare(Element& x, const Scalars& c, float scale) {
    x.g = scale * x.g;
    if constexpr (couples<Scalars>) x.g = c.coupled != 0 ? x.g + c.coupled * x.p : x.g;
  }

  DEVICE void norm_chunk(const Next& next) {
    const Row& row = next.row;
    Stats<1, 0> squares;
    {
      sweep<G, 0, G>(next.places, row.count, false, [&](const Element(&x)[QUAD], int, int inside) {
        for (int j = 0; j < QUAD; ++j) Share<Stats<1, 0>>{squares, j < inside}.add(0, x[j].g, x[j].g);
      });
    }
    squares = total(squares, shared.board);
    if (!arrives(at.norm_partials + next.item / 4, squares, at.counters + NORMS, launch.norms)) return;
    squares = total_of<Stats<1, 0>>(at.norm_partials, 0, launch.norms, shared.combined);
    if (!speaks()) return;
    *at.norm = sqrt(squares.sum[0]) / (at.grad_scale ? double(*at.grad_scale) : 1);
    device::publish(at.counters + NORM_READY);  // the norm
  }

  // Leaves a chunk's stats in its slot. True for the block that comes last and so finds everybody's.
  template <class T>
  DEVICE bool arrives(double* slot, T stats, uint32_t* counter, int chunks) {
    if (speaks()) {
#pragma unroll
      for (int k = 0; k < T::count; ++k) slot[k] = stats.get(k);
      shared.last = int(device::arrive(counter)) == chunks - 1;
    }
    device::barrier();  // everybody of the block learns of it, and sees what its first thread has acquired
    return shared.last;
  }

  DEVICE uint32_t* arrived(const Next& next) const { return at.counters + ARRIVED + 2 * int64_t(next.row.layer); }
  DEVICE uint32_t* ready(const Next& next) const { return arrived(next) + 1; }

  // A chunk's share of its layer's stats. True for the block that comes last.
  DEVICE bool reduce_chunk(const Next& next) {
    constexpr Sweep operands = R::reduce_sweep;
    const Row& row = next.row;
    const Scalars& c = next.own().scalars;
    const float factor = scale(next);
    S stats;
    sweep<with_p<R>(operands.reads), operands.writes, R::apply_sweep.reads>(
        next.places, row.count, (operands.reads & P) != 0 || coupled(c) != 0,
        [&](Element(&x)[QUAD], int, int inside) { moments(x, c, factor, stats, inside); });
    stats = total(stats, shared.board);
    if (!arrives(at.partials + next.item / 4 * S::count, stats, arrived(next), row.chunks)) return false;
    keep(row, total_of<S>(at.partials, row.first, row.chunks, shared.combined));
    return true;
  }

  DEVICE static void moments(Element (&x)[QUAD], const Scalars& c, float factor, S& stats, int inside) {
#pragma unroll
    for (int j = 0; j < QUAD; ++j) {
      prepare(x[j], c, factor);
      R::moments(c, x[j]);
      Share<S> share{stats, j < inside};
      R::stats(c, x[j], share);
    }
  }

  DEVICE void apply_chunk(const Next& next) {
    constexpr Sweep operands = R::apply_sweep;
    const Row& row = next.row;
    if (speaks()) {
      if (launch.phases & REDUCE) wait(ready(next));  // acquires what the last to arrive published
      shared.finished = *reinterpret_cast<const Scalars*>(at.scalars + int64_t(row.layer) * MAX_SCALARS);
    }
    device::barrier();  // publishes scalars and moments to the block
    const float factor = scale(next);
    sweep<with_p<R>(operands.reads), operands.writes, 0>(
        next.places, row.count, true, [&](Element(&x)[QUAD], int, int) { update(x, shared.finished, factor); });
  }

  DEVICE static void update(Element (&x)[QUAD], const Scalars& c, float factor) {
#pragma unroll
    for (int j = 0; j < QUAD; ++j) {
      prepare(x[j], c, factor);
      R::apply(c, x[j]);
    }
  }

  // A small layer: read once, written once.
  DEVICE bool reduce_on_chip(const Next& next) {
    constexpr unsigned reads = with_p<R>(both_sweep<R>.reads), writes = R::reduce_sweep.writes & ~R::apply_sweep.writes;
    const Scalars& c = next.own().scalars;
    const float factor = scale(next);
    S stats;
    sweep<reads, writes, 0>(next.places, next.row.count, true, [&](Element(&x)[QUAD], int i, int inside) {
      moments(x, c, factor, stats, inside);
#pragma unroll
      for (int j = 0; j < QUAD; ++j) shared.stash.put(x[j], i + j);
    });
    keep(next.row, total(stats, shared.board));
    return true;
  }

  DEVICE void apply_on_chip(const Next& next) {
    device::barrier();  // publishes the layer's scalars to the block
    const int count = next.row.count;
#pragma unroll 1
    for (int i = QUAD * int(device::thread()); i < count; i += TILE) {
      Element x[QUAD];
#pragma unroll
      for (int j = 0; j < QUAD; ++j) {
        x[j] = shared.stash.get(i + j);
        R::apply(shared.finished, x[j]);
      }
      write<R::apply_sweep.writes, 0>(x, next.places, i, count - i < QUAD ? count - i : QUAD);
    }
  }

  // A chunk of a layer without stats has nothing to wait for: each finishes for itself.
  DEVICE void apply_elementwise(const Next& next) {
    constexpr Sweep operands = both_sweep<R>;
    const Row& row = next.row;
    if (!next.places.there) return;
    double report[R::reports > 0 ? R::reports : 1];
    Scalars c = next.own().scalars;
    R::finish(next.own().row, Total{nullptr, 0, next.time, false, state(row), report}, c);
    if (speaks() && next.item / 4 == row.first) {  // one chunk speaks for the layer
#pragma unroll
      for (int k = 0; k < R::reports; ++k) at.report[int64_t(row.layer) * R::reports + k] = report[k];
    }
    const float factor = scale(next);
    sweep<with_p<R>(operands.reads), operands.writes, 0>(
        next.places, row.count, true, [&](Element(&x)[QUAD], int, int) {
#pragma unroll
          for (int j = 0; j < QUAD; ++j) {
            prepare(x[j], c, factor);
            R::moments(c, x[j]);
            R::apply(c, x[j]);
          }
        });
  }

  // Layers

  DEVICE double* state(const Row& row) const { return at.state ? at.state + row.state : nullptr; }

  DEVICE void keep(const Row& row, S stats) const {
    if (!speaks()) return;
#pragma unroll
    for (int k = 0; k < S::count; ++k) {
      at.stats[int64_t(row.layer) * S::count + k] = stats.get(k);
      shared.stats[k] = stats.get(k);
    }
  }

  // The layer's scalars, left for `apply`; they, the report and the state stay as they are if it has no gradient.
  DEVICE void finish(const Next& next) const {
    const Row& row = next.row;
    const int64_t elements = word(launch.words.elements(row.layer));
    if (elements < 0) return;
    shared.finished = next.own().scalars;
    const Total layer{shared.stats, double(elements), next.time, true, state(row), at.report + int64_t(row.layer) * R::reports};
    R::finish(next.own().row, layer, shared.finished);
    *reinterpret_cast<Scalars*>(at.scalars + int64_t(row.layer) * MAX_SCALARS) = shared.finished;
    for (int k = 1; at.state && k < row.states; ++k) at.state[row.state + k] = at.state[row.state];  // alike in every member
  }

  // The phase between `reduce` and `apply` by itself: somebody may have changed the stats.
  DEVICE bool recall(const Next& next) const {
    if (next.item / 4 != next.row.first) return false;  // one chunk speaks for the layer
    if (speaks())
      for (int k = 0; k < S::count; ++k) shared.stats[k] = at.stats[int64_t(next.row.layer) * S::count + k];
    return true;
  }

  // The last block to leave counts the step, keeps what the argument brought and clears the counters.
  DEVICE void leave() {
    device::barrier();  // of all threads, before one of them speaks for them
    if (speaks()) shared.last = device::arrive(at.counters + LEFT) == device::blocks() - 1;
    device::barrier();
    if (!shared.last) return;
    settle();
    if (launch.phases & APPLY) {
      for (int64_t k = device::thread(); shared.happens && k < launch.words.tensors; k += THREADS)
        at.step[k] += float(word(launch.words.types(k)) >> 32 & 1);
      if (!shared.happens && speaks()) *at.skipped += 1;
    }
    for (int k = device::thread(); launch.keep && k < launch.sent; k += THREADS) at.words[launch.first + k] = launch.word[k];
    for (int k = device::thread(); k < launch.counters; k += THREADS) at.counters[k] = 0;
  }
};

}  // namespace layerfused::cuda
