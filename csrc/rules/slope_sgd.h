// The first launch of CurvatureSGD: the momentum, which is the direction, and the slope along it.
#pragma once
#include "curvature.h"

namespace layerfused {

struct slope_sgd {
  struct Group {
    double lr, momentum, weight_decay;
    curvature::Settings settings;
  };
  struct Scalars { float c1, ic1, weight_decay, lr; };
  static constexpr Sweep reduce_sweep{P | G | M, M}, apply_sweep{M, 0};
  enum { PP, DD, GD, PD };
  static constexpr int sums = 4, minima = 0, reports = curvature::REPORTS;

  static RULE_FN Scalars start(const Group& h, double t) {
    return {float(1 - h.momentum), float(correction(h.momentum, t)), float(h.weight_decay), 0};
  }
  static RULE_FN void moments(const Scalars& c, Element& x) { average(x.m, c.c1, x.g + c.weight_decay * x.p); }
  template <class Out> static RULE_FN void stats(const Scalars& c, const Element& x, Out& out) {
    const float d = direction(c, x);
    out.add(PP, x.p, x.p);
    out.add(DD, d, d);
    out.add(GD, x.g, d);
    out.add(PD, x.p, d);
  }
  static RULE_FN void finish(const Group& h, const Total& layer, Scalars&) {
    const double* sum = layer.stats;
    curvature::find_slope(h.settings, layer, sum[PP], sum[DD], sum[GD], h.weight_decay * sum[PD]);
  }
  // A prediction goes uphill by reach*sign: there the gradient is taken once more.
  static RULE_FN void recall(const Group& h, const Total& layer, Scalars& c) {
    c.lr = -float(h.settings.reach * layer.report[curvature::SIGN]);
  }
  static RULE_FN float direction(const Scalars& c, const Element& x) { return c.ic1 * x.m; }
  static RULE_FN void apply(const Scalars&, Element&) {}
};

}  // namespace layerfused
