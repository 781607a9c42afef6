// The kernel: any number of blocks run one rule over a plan, in one launch.
//
// Blocks take items in the order of their tickets, each one ahead of the item it works on. An item waits only for items
// with smaller tickets, which are some block's already, and that block's turn comes before its later ones: no deadlock
// with any number of blocks. Whoever arrives last at a layer adds up its chunks' partial stats in the order of their
// slots and finishes the layer; whoever leaves the launch last counts the steps and clears the counters, so that a
// launch can be replayed as it is. No optimizer is known here by name.
#pragma once
#include "cuda/lookup.h"
#include "plan.h"

namespace layerfused::cuda {

template <class R, int WORDS>
class Block : Lookup<R, WORDS> {
  using Base = Lookup<R, WORDS>;
  using Base::at, Base::launch, Base::shared;
  using Base::begin, Base::look_up, Base::scale, Base::settle, Base::speaks, Base::wait, Base::word;
  using typename Base::Next;
  using Scalars = typename R::Scalars;
  using S = Stats<R::sums, R::minima>;
  static_assert(sizeof(Scalars) <= MAX_SCALARS * sizeof(float), "raise MAX_SCALARS");

 public:
  DEVICE Block(const Launch<WORDS>& launch, Shared<R>& shared) : Base(launch, shared) {}

  DEVICE void run() {
    if (speaks()) {
      shared.first = launch.phases & NORM ? 0 : launch.norms;  // the norm's items are passed over
      shared.began = false, shared.happens = true;
      for (auto& next : shared.next)
        for (auto& started : next.started) started.group = NONE;
      look_up(shared.next[0], take());
    }
    for (int turn = 0;; turn ^= 1) {
      device::barrier();  // publishes this turn's item
      if (shared.next[turn].item == NONE) break;
      int next = 0;
      if (speaks()) next = take();  // under way meanwhile
      work_on(shared.next[turn]);
      if (!shared.happens) break;
      if (speaks()) look_up(shared.next[turn ^ 1], next);
    }
    leave();
  }

 private:
  // Items

  DEVICE int take() const { return shared.first + int(device::take(at.counters + TICKET)); }

  DEVICE void work_on(const Next& next) {
    const Kind kind = Kind(next.item % 4);
    if (kind == Kind::norm) return norm_chunk(next);
    if (!shared.began) {
      begin();
      if (speaks()) shared.began = true;  // all have passed the barrier in `begin`, and the next to ask passes another
    }
    if (!shared.happens) return;
    if (launch.phases & PREDICT) {
      if (kind != Kind::reduce) predict_chunk(next);
      return;
    }
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
        next.places, row.count, true, [&](Element(&x)[QUAD], int i, int inside) {
          update(x, shared.finished, factor);
          if (launch.leads) predict(x, shared.finished, next.places, i, inside);
        });
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
      if (launch.leads) predict(x, shared.finished, next.places, i, count - i < QUAD ? count - i : QUAD);
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
        next.places, row.count, true, [&](Element(&x)[QUAD], int i, int inside) {
#pragma unroll
          for (int j = 0; j < QUAD; ++j) {
            prepare(x[j], c, factor);
            R::moments(c, x[j]);
            R::apply(c, x[j]);
          }
          if (launch.leads) predict(x, c, next.places, i, inside);
        });
  }

  // Predictions

  // From what is stored, so that it is the same bits when it is made from memory later.
  DEVICE void predict(const Element (&x)[QUAD], const Scalars& c, const Places& places, int i, int inside) const {
    float ahead[QUAD];
#pragma unroll
    for (int j = 0; j < QUAD; ++j) ahead[j] = predicted<R>(c, as_stored(x[j], places), shared.ahead);
    write_one<0, 4>(ahead, places, i, inside);
  }

  // From the last step's numbers.
  DEVICE void predict_chunk(const Next& next) {
    const Row& row = next.row;
    if (speaks()) {
      shared.finished = next.own().scalars;
      double* report = at.report + int64_t(row.layer) * R::reports;
      layerfused::recall<R>(next.own().row, Total{nullptr, 0, next.time, row.adapt != 0, state(row), report}, shared.finished);
    }
    device::barrier();  // publishes the layer's scalars to the block
    sweep<predict_reads<R>, 0, 0>(next.places, row.count, true, [&](Element(&x)[QUAD], int i, int inside) {
      predict(x, shared.finished, next.places, i, inside);
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
    double* report = at.report + int64_t(row.layer) * R::reports;
    const Total layer{shared.stats, double(elements), next.time, true, state(row), report};
    R::finish(next.own().row, layer, shared.finished);
    *reinterpret_cast<Scalars*>(at.scalars + int64_t(row.layer) * MAX_SCALARS) = shared.finished;
    for (int k = 1; at.state && k < row.states; ++k)  // alike in every member of the layer
      at.state[row.state + k] = at.state[row.state];
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
    for (int k = device::thread(); launch.keep && k < launch.sent; k += THREADS)
      at.words[launch.first + k] = launch.word[k];
    for (int k = device::thread(); k < launch.counters; k += THREADS) at.counters[k] = 0;
  }
};

}  // namespace layerfused::cuda
