// LAdam and LAdaBelief, pre-processing (arXiv 2203.13273 v1-v3, author code): one second moment per layer.
#pragma once
#include "rule.h"

namespace layerfused {

struct ladam_pre {
  struct Group { double lr, beta1, beta2, eps, weight_decay, belief, decoupled; };
  struct Scalars { float coupled, c1, belief, lr, decay, scale; };
  static constexpr Sweep reduce_sweep{G | M, M}, apply_sweep{P | M, P};
  enum { QQ };
  static constexpr int sums = 1, minima = 0, reports = 1;

  static RULE_FN Scalars start(const Group& h, double) {
    const bool decoupled = h.decoupled != 0;
    return {float(decoupled ? 0 : h.weight_decay), float(1 - h.beta1), float(h.belief),
            float(h.lr), float(decoupled ? h.lr * h.weight_decay : 0), 0};
  }
  static RULE_FN void moments(const Scalars& c, Element& x) { average(x.m, c.c1, x.g); }
  template <class Out> static RULE_FN void stats(const Scalars& c, const Element& x, Out& out) {
    const float q = c.belief != 0 ? x.g - x.m : x.g;
    out.add(QQ, q, q);
  }
  static RULE_FN void finish(const Group& h, const Total& layer, Scalars& c) {
    double& v = *layer.state;
    const double mean = layer.elements > 0 ? layer.stats[QQ] / layer.elements : 0;
    v += (1 - h.beta2) * (mean - v) + h.eps;
    layer.report[0] = v;
    recall(h, layer, c);
  }
  static RULE_FN void recall(const Group& h, const Total& layer, Scalars& c) {
    c.scale = float(correction(h.beta1, layer.t) / std::sqrt(correction(h.beta2, layer.t) * *layer.state));
  }
  static RULE_FN float direction(const Scalars& c, const Element& x) { return c.scale * x.m; }
  static RULE_FN void apply(const Scalars& c, Element& x) { x.p -= c.lr * direction(c, x) + c.decay * x.p; }
};

}  // namespace layerfused
