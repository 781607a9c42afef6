// SGD without momentum: no state at all.
#pragma once
#include "rule.h"

namespace layerfused {

struct sgd_plain {
  struct Group { double lr, weight_decay; };
  struct Scalars { float coupled, lr; };
  static constexpr Sweep reduce_sweep{0, 0}, apply_sweep{P | G, P};
  static constexpr int sums = 0, minima = 0, reports = 0;

  static RULE_FN Scalars start(const Group& h, double) { return {float(h.weight_decay), float(h.lr)}; }
  static RULE_FN void moments(const Scalars&, Element&) {}
  template <class Out> static RULE_FN void stats(const Scalars&, const Element&, Out&) {}
  static RULE_FN void finish(const Group&, const Total&, Scalars&) {}
  static RULE_FN float direction(const Scalars&, const Element&) { return 0; }  // no state to tell it from
  static RULE_FN void apply(const Scalars& c, Element& x) { x.p -= c.lr * x.g; }
};

}  // namespace layerfused
