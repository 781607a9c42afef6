// LAdam and LAdaBelief, post-processing [ours: the abstract of arXiv 2203.13273 v1 only names it]: the elementwise
// second moment is kept and its root averaged over the layer when it is used. (The mean of 1/(root + eps) would be
// ruled by one dead element.)
#pragma once
#include "rule.h"

namespace layerfused {

struct ladam_post {
  struct Group { double lr, beta1, beta2, eps, weight_decay, belief, decoupled; };
  struct Scalars { float coupled, c1, c2, belief, inner_eps, lr, decay, scale; };
  static constexpr Sweep reduce_sweep{G | M | V, M | V}, apply_sweep{P | M, P};
  enum { ROOT };
  static constexpr int sums = 1, minima = 0, reports = 1;

  static RULE_FN Scalars start(const Group& h, double) {
    const bool decoupled = h.decoupled != 0;
    return {float(decoupled ? 0 : h.weight_decay), float(1 - h.beta1), float(1 - h.beta2), float(h.belief),
            float(h.belief != 0 ? h.eps : 0), float(h.lr), float(decoupled ? h.lr * h.weight_decay : 0), 0};
  }
  static RULE_FN void moments(const Scalars& c, Element& x) {
    average(x.m, c.c1, x.g);
    average(x.v, c.c2, square(c.belief != 0 ? x.g - x.m : x.g));
    x.v += c.inner_eps;  // AdaBelief's v has eps in it, Adam's has not
  }
  template <class Out> static RULE_FN void stats(const Scalars&, const Element& x, Out& out) {
    out.add(ROOT, root(x.v), 1);
  }
  static RULE_FN void finish(const Group& h, const Total& layer, Scalars& c) {
    const double mean = layer.elements > 0 ? layer.stats[ROOT] / layer.elements : 0;
    layer.report[0] = std::sqrt(correction(h.beta2, layer.t)) * mean + h.eps;
    recall(h, layer, c);
  }
  static RULE_FN void recall(const Group& h, const Total& layer, Scalars& c) {
    const double denominator = layer.report[0];
    c.scale = float(denominator != 0 ? correction(h.beta1, layer.t) / denominator : 0);
  }
  static RULE_FN float direction(const Scalars& c, const Element& x) { return c.scale * x.m; }
  static RULE_FN void apply(const Scalars& c, Element& x) { x.p -= c.lr * direction(c, x) + c.decay * x.p; }
};

}  // namespace layerfused
