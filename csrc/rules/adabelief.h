// AdaBelief (Zhuang et al., arXiv 2010.07468; author code adabelief-pytorch 0.2): eps accumulates in the state.
#pragma once
#include "rule.h"

namespace layerfused {

struct adabelief {
  struct Group { double lr, beta1, beta2, eps, weight_decay, decoupled, rectify; };
  struct Scalars { float coupled, c1, c2, ic1, ic2, eps, lr, decay, plain; };
  static constexpr Sweep reduce_sweep{0, 0}, apply_sweep{P | G | M | V, P | M | V};
  static constexpr int sums = 0, minima = 0, reports = 0;

  static RULE_FN Scalars start(const Group& h, double t) {
    const bool decoupled = h.decoupled != 0;
    const double rectified = h.rectify != 0 ? rectification(h.beta2, t) : 1;  // 0: too early to trust s
    const double ic1 = correction(h.beta1, t) * (rectified > 0 ? rectified : 1);
    return {float(decoupled ? 0 : h.weight_decay), float(1 - h.beta1), float(1 - h.beta2),
            float(ic1), float(correction(h.beta2, t)), float(h.eps), float(h.lr),
            float(decoupled ? h.lr * h.weight_decay : 0), float(rectified > 0 ? 0 : 1)};
  }
  // RAdam (arXiv 1908.03265, section 4.2): 0 while the variance of the adaptive step is intractable.
  static RULE_FN double rectification(double beta2, double t) {
    const double limit = 2 / (1 - beta2) - 1, decayed = power(beta2, t);
    const double length = limit - 2 * t * decayed / (1 - decayed);
    if (length < 5) return 0;
    return std::sqrt((length - 4) * (length - 2) * limit / ((limit - 4) * (limit - 2) * length));
  }
  static RULE_FN void moments(const Scalars& c, Element& x) {
    average(x.m, c.c1, x.g);
    average(x.v, c.c2, square(x.g - x.m));
    x.v += c.eps;
  }
  template <class Out> static RULE_FN void stats(const Scalars&, const Element&, Out&) {}
  static RULE_FN void finish(const Group&, const Total&, Scalars&) {}
  static RULE_FN float direction(const Scalars& c, const Element& x) {
    const float denominator = root(c.ic2 * x.v) + c.eps;
    return c.ic1 * x.m / (c.plain != 0 ? 1.0f : denominator);
  }
  static RULE_FN void apply(const Scalars& c, Element& x) { x.p -= c.lr * direction(c, x) + c.decay * x.p; }
};

}  // namespace layerfused
