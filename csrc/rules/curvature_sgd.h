// The second launch of CurvatureSGD: the curvature along the momentum, and a step of the size that it allows.
#pragma once
#include "rules/slope_sgd.h"

namespace layerfused {

struct curvature_sgd {
  using Group = slope_sgd::Group;
  struct Scalars { float ic1, lr, step; };
  static constexpr Sweep reduce_sweep{G | M, 0}, apply_sweep{P | M, P};
  enum { GD };
  static constexpr int sums = 1, minima = 0, reports = curvature::REPORTS;

  static RULE_FN Scalars start(const Group& h, double t) {
    return {float(correction(h.momentum, t)), float(h.lr), 0};
  }
  static RULE_FN void moments(const Scalars&, Element&) {}
  template <class Out> static RULE_FN void stats(const Scalars& c, const Element& x, Out& out) {
    out.add(GD, x.g, c.ic1 * x.m);
  }
  static RULE_FN void finish(const Group& h, const Total& layer, Scalars& c) {
    curvature::find_step(h.settings, layer, layer.stats[GD], h.weight_decay);
    recall(h, layer, c);
  }
  static RULE_FN void recall(const Group&, const Total& layer, Scalars& c) {
    c.step = float(layer.report[curvature::STEP_SIZE]);
  }
  static RULE_FN float direction(const Scalars& c, const Element& x) { return c.step * (c.ic1 * x.m); }
  static RULE_FN void apply(const Scalars& c, Element& x) { x.p -= c.lr * direction(c, x); }
};

}  // namespace layerfused
