// AdamNorm and AdaBeliefNorm (AdaNorm, arXiv 2210.06364; author code): a gradient shorter than its running norm is
// lengthened to it before it enters m.
#pragma once
#include "rule.h"

namespace layerfused {

struct adanorm {
  struct Group { double lr, beta1, beta2, eps, weight_decay, gamma, belief, decoupled; };
  struct Scalars { float coupled, c1, c2, ic1, ic2, eps, lr, decay, belief, reach, unit; };
  static constexpr Sweep reduce_sweep{G, 0}, apply_sweep{P | G | M | V, P | M | V};
  enum { GG };
  static constexpr int sums = 1, minima = 0, reports = 3;

  static RULE_FN Scalars start(const Group& h, double t) {
    const bool decoupled = h.decoupled != 0;
    return {float(decoupled ? 0 : h.weight_decay), float(1 - h.beta1), float(1 - h.beta2),
            float(correction(h.beta1, t)), float(correction(h.beta2, t)), float(h.eps), float(h.lr),
            float(decoupled ? h.lr * h.weight_decay : 0), float(h.belief), 1, 1};
  }
  static RULE_FN void moments(const Scalars&, Element&) {}
  template <class Out> static RULE_FN void stats(const Scalars&, const Element& x, Out& out) {
    out.add(GG, x.g, x.g);
  }
  static RULE_FN void finish(const Group& h, const Total& layer, Scalars& c) {
    double norm = 0, reach = 1, unit = 1;
    if (layer.adapt) {
      double& e = *layer.state;
      norm = std::sqrt(layer.stats[GG]);
      e += (1 - h.gamma) * (norm - e);
      if (norm > 1e-37 && e > norm) reach = e, unit = 1 / norm;  // of less than that 1/norm passes fp32's range
    }
    c.reach = float(reach), c.unit = float(unit);  // their product can pass fp32's range: 1e18 over 1e-30
    layer.report[0] = norm, layer.report[1] = *layer.state, layer.report[2] = reach * unit;
  }
  static RULE_FN float direction(const Scalars& c, const Element& x) {
    return c.ic1 * x.m / (root(c.ic2 * x.v) + c.eps);
  }
  static RULE_FN void apply(const Scalars& c, Element& x) {
    const float lengthened = c.reach * (c.unit * x.g);
    average(x.m, c.c1, lengthened);
    average(x.v, c.c2, square(c.belief != 0 ? lengthened - x.m : x.g));
    x.v += c.eps;
    x.p -= c.lr * direction(c, x) + c.decay * x.p;
  }
};

}  // namespace layerfused
