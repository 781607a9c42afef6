// The first launch of CurvatureAdamW: Adam's moments, their direction, and the slope along it.
#pragma once
#include "curvature.h"

namespace layerfused {

struct slope_adam {
  struct Group {
    double lr, beta1, beta2, eps, weight_decay;
    curvature::Settings settings;
  };
  struct Scalars { float c1, c2, ic1, ic2, eps, lr; };
  static constexpr Sweep reduce_sweep{P | G | M | V, M | V}, apply_sweep{M | V, 0};
  enum { PP, DD, GD };
  static constexpr int sums = 3, minima = 0, reports = curvature::REPORTS;

  static RULE_FN Scalars start(const Group& h, double t) {
    return {float(1 - h.beta1), float(1 - h.beta2), float(correction(h.beta1, t)), float(correction(h.beta2, t)),
            float(h.eps), 0};
  }
  static RULE_FN void moments(const Scalars& c, Element& x) {
    average(x.m, c.c1, x.g);
    average(x.v, c.c2, square(x.g));
  }
  template <class Out> static RULE_FN void stats(const Scalars& c, const Element& x, Out& out) {
    const float d = direction(c, x);
    out.add(PP, x.p, x.p);
    out.add(DD, d, d);
    out.add(GD, x.g, d);
  }
  static RULE_FN void finish(const Group& h, const Total& layer, Scalars&) {
    const double* sum = layer.stats;
    curvature::find_slope(h.settings, layer, sum[PP], sum[DD], sum[GD], 0);
  }
  // A prediction goes uphill by reach*sign: there the gradient is taken once more.
  static RULE_FN void recall(const Group& h, const Total& layer, Scalars& c) {
    c.lr = -float(h.settings.reach * layer.report[curvature::SIGN]);
  }
  static RULE_FN float direction(const Scalars& c, const Element& x) {
    return c.ic1 * x.m / (root(c.ic2 * x.v) + c.eps);
  }
  static RULE_FN void apply(const Scalars&, Element&) {}
};

}  // namespace layerfused
