// LAMB (You et al., arXiv 1904.00962 v5, Algorithm 2) and LAMBC (arXiv 2011.13584: the ratio bounded from above).
#pragma once
#include "rule.h"

namespace layerfused {

struct lamb {
  struct Group {
    double lr, beta1, beta2, eps, weight_decay, bias_correction, grad_averaging, lower, upper;
  };
  struct Scalars { float c1, take, c2, ic1, ic2, eps, weight_decay, lr, ratio; };
  static constexpr Sweep reduce_sweep{P | G | M | V, M | V}, apply_sweep{P | M | V, P};
  enum { PP, UU };
  static constexpr int sums = 2, minima = 0, reports = 3;

  static RULE_FN Scalars start(const Group& h, double t) {
    const bool corrected = h.bias_correction != 0;
    return {float(1 - h.beta1), float(h.grad_averaging != 0 ? 1 : 1 / (1 - h.beta1)), float(1 - h.beta2),
            float(corrected ? correction(h.beta1, t) : 1), float(corrected ? correction(h.beta2, t) : 1),
            float(h.eps), float(h.weight_decay), float(h.lr), 1};
  }
  static RULE_FN void moments(const Scalars& c, Element& x) {
    average(x.m, c.c1, c.take * x.g);
    average(x.v, c.c2, square(x.g));
  }
  static RULE_FN float adam(const Scalars& c, const Element& x) {
    return c.ic1 * x.m / (root(c.ic2 * x.v) + c.eps);
  }
  static RULE_FN float update(const Scalars& c, const Element& x) { return adam(c, x) + c.weight_decay * x.p; }
  template <class Out> static RULE_FN void stats(const Scalars& c, const Element& x, Out& out) {
    const float u = update(c, x);
    out.add(PP, x.p, x.p);
    out.add(UU, u, u);
  }
  static RULE_FN void finish(const Group& h, const Total& layer, Scalars& c) {
    double norm_p = 0, norm_u = 0, ratio = 1;
    if (layer.adapt) {
      norm_p = std::sqrt(layer.stats[PP]), norm_u = std::sqrt(layer.stats[UU]);
      if (norm_p != 0 && norm_u != 0) ratio = norm_p / norm_u;
      ratio = ratio < h.lower ? h.lower : ratio > h.upper ? h.upper : ratio;
    }
    layer.report[0] = norm_p, layer.report[1] = norm_u, layer.report[2] = ratio;
    recall(h, layer, c);
  }
  static RULE_FN void recall(const Group&, const Total& layer, Scalars& c) { c.ratio = float(layer.report[2]); }
  static RULE_FN float direction(const Scalars& c, const Element& x) { return c.ratio * adam(c, x); }
  static RULE_FN void apply(const Scalars& c, Element& x) { x.p -= c.lr * (c.ratio * update(c, x)); }
};

}  // namespace layerfused
