// Adam (Kingma & Ba, arXiv 1412.6980, Algorithm 1) and, with decoupled decay, AdamW (arXiv 1711.05101).
#pragma once
#include "rule.h"

namespace layerfused {

struct adam {
  struct Group { double lr, beta1, beta2, eps, weight_decay, decoupled; };
  struct Scalars { float coupled, c1, c2, ic1, ic2, eps, lr, decay; };
  static constexpr Sweep reduce_sweep{0, 0}, apply_sweep{P | G | M | V, P | M | V};
  static constexpr int sums = 0, minima = 0, reports = 0;

  static RULE_FN Scalars start(const Group& h, double t) {
    const bool decoupled = h.decoupled != 0;
    return {float(decoupled ? 0 : h.weight_decay), float(1 - h.beta1), float(1 - h.beta2),
            float(correction(h.beta1, t)), float(correction(h.beta2, t)), float(h.eps), float(h.lr),
            float(decoupled ? h.lr * h.weight_decay : 0)};
  }
  static RULE_FN void moments(const Scalars& c, Element& x) {
    average(x.m, c.c1, x.g);
    average(x.v, c.c2, square(x.g));
  }
  template <class Out> static RULE_FN void stats(const Scalars&, const Element&, Out&) {}
  static RULE_FN void finish(const Group&, const Total&, Scalars&) {}
  static RULE_FN float direction(const Scalars& c, const Element& x) {
    return c.ic1 * x.m / (root(c.ic2 * x.v) + c.eps);
  }
  static RULE_FN void apply(const Scalars& c, Element& x) { x.p -= c.lr * direction(c, x) + c.decay * x.p; }
};

}  // namespace layerfused
