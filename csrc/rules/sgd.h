// SGD with momentum, step for step torch.optim.SGD.
#pragma once
#include "rule.h"

namespace layerfused {

struct sgd {
  struct Group { double lr, momentum, dampening, weight_decay, nesterov; };
  struct Scalars { float coupled, momentum, take, lr, nesterov; };
  static constexpr Sweep reduce_sweep{0, 0}, apply_sweep{P | G | M, P | M};
  static constexpr int sums = 0, minima = 0, reports = 0;

  static RULE_FN Scalars start(const Group& h, double t) {
    const bool first = t == 1;  // the buffer starts as the gradient itself, not damped
    return {float(h.weight_decay), float(first ? 0 : h.momentum), float(first ? 1 : 1 - h.dampening), float(h.lr),
            float(h.nesterov ? h.momentum : 0)};
  }
  static RULE_FN void moments(const Scalars&, Element&) {}
  template <class Out> static RULE_FN void stats(const Scalars&, const Element&, Out&) {}
  static RULE_FN void finish(const Group&, const Total&, Scalars&) {}
  static RULE_FN float direction(const Scalars&, const Element& x) { return x.m; }
  static RULE_FN void apply(const Scalars& c, Element& x) {
    x.m = c.momentum * x.m + c.take * x.g;
    x.p -= c.lr * (c.nesterov != 0 ? x.g + c.nesterov * x.m : x.m);
  }
};

}  // namespace layerfused
