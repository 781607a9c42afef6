// What the threads of a block share.
#pragma once
#include "cuda/device.h"
#include "cuda/launch.h"
#include "cuda/sums.h"
#include "cuda/tile.h"
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

// All that is the block's and not a thread's, for registers are short. The halves of
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
  float ahead;    // steps that are predicted
  int first;      // the ticket that the launch begins with
  bool began;     // whether the norm is known
  bool happens, last;
};

}  // namespace layerfused::cuda
