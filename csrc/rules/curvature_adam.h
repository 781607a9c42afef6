// The second launch of CurvatureAdamW: the curvature along Adam's direction, and a step of the size that it allows.
#pragma once
#include "rules/slope_adam.h"

namespace layerfused {

struct curvature_adam {
  using Group = slope_adam::Group;
  struct Scalars { float ic1, ic2, eps, weight_decay, lr, step; };
  static constexpr Sweep reduce_sweep{G | M | V, 0}, apply_sweep{P | M | V, P};
  enum { GD };
  static constexpr int sums = 1, minima = 0, reports = curvature::REPORTS;

  static RULE_FN Scalars start(const Group& h, double t) {
    return {float(correction(h.beta1, t)), float(correction(h.beta2, t)), float(h.eps), float(h.weight_decay),
            float(h.lr), 0};
  }
  static RULE_FN void moments(const Scalars&, Element&) {}
  static RULE_FN float adam(const Scalars& c, const Element& x) {
    return c.ic1 * x.m / (root(c.ic2 * x.v) + c.eps);
  }
  template <class Out> static RULE_FN void stats(const Scalars& c, const Element& x, Out& out) {
    out.add(GD, x.g, adam(c, x));
  }
  static RULE_FN void finish(const Group& h, const Total& layer, Scalars& c) {
    curvature::find_step(h.settings, layer, layer.stats[GD], 0);
    recall(h, layer, c);
  }
  static RULE_FN void recall(const Group&, const Total& layer, Scalars& c) {
    c.step = float(layer.report[curvature::STEP_SIZE]);
  }
  static RULE_FN float direction(const Scalars& c, const Element& x) { return c.step * adam(c, x); }
  static RULE_FN void apply(const Scalars& c, Element& x) {
    x.p -= c.lr * (c.step * (adam(c, x) + c.weight_decay * x.p));
  }
};

}  // namespace layerfused
