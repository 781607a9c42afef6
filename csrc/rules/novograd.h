// NovoGrad (Ginsburg et al., arXiv 1905.11286, Algorithm 1): one second moment per layer.
#pragma once
#include "rule.h"

namespace layerfused {

struct novograd {
  struct Group { double lr, beta1, beta2, eps, weight_decay, grad_averaging; };
  struct Scalars { float beta1, take, weight_decay, lr; };
  static constexpr Sweep reduce_sweep{G, 0}, apply_sweep{P | G | M, P | M};
  enum { GG };
  static constexpr int sums = 1, minima = 0, reports = 2;

  static RULE_FN Scalars start(const Group& h, double) {
    return {float(h.beta1), 0, float(h.weight_decay), float(h.lr)};
  }
  static RULE_FN void moments(const Scalars&, Element&) {}
  template <class Out> static RULE_FN void stats(const Scalars&, const Element& x, Out& out) {
    out.add(GG, x.g, x.g);
  }
  static RULE_FN void finish(const Group& h, const Total& layer, Scalars& c) {
    double& v = *layer.state;  // 0 until the first non-zero gradient
    v = v == 0 ? layer.stats[GG] : v + (1 - h.beta2) * (layer.stats[GG] - v);
    const double average = h.grad_averaging != 0 ? 1 - h.beta1 : 1;
    const double denominator = std::sqrt(v) + h.eps;
    c.take = float(denominator != 0 ? average / denominator : 0);
    c.weight_decay = float(average * h.weight_decay);
    layer.report[0] = std::sqrt(layer.stats[GG]), layer.report[1] = v;
  }
  static RULE_FN float direction(const Scalars&, const Element& x) { return x.m; }
  static RULE_FN void apply(const Scalars& c, Element& x) {
    x.m = c.beta1 * x.m + (c.take * x.g + c.weight_decay * x.p);
    x.p -= c.lr * direction(c, x);
  }
};

}  // namespace layerfused
