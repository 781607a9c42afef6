// SET-Adam (arXiv 2302.01029): down-scaling, eps-embedding and down-translating of v at use; v itself stays Adam's.
#pragma once
#include "rule.h"

namespace layerfused {

struct setadam {
  struct Group { double lr, beta1, beta2, eps, weight_decay, tau, decoupled; };
  struct Scalars { float coupled, c1, c2, ic1, eps, lr, decay, scale, shift; };
  static constexpr Sweep reduce_sweep{G | M | V, M | V}, apply_sweep{P | M | V, P};
  enum { SUM, SQUARES, LEAST };
  static constexpr int sums = 2, minima = 1, reports = 2;

  static RULE_FN Scalars start(const Group& h, double t) {
    const bool decoupled = h.decoupled != 0;
    return {float(decoupled ? 0 : h.weight_decay), float(1 - h.beta1), float(1 - h.beta2),
            float(correction(h.beta1, t)), float(h.eps), float(h.lr), float(decoupled ? h.lr * h.weight_decay : 0),
            float(correction(h.beta2, t)), 0};
  }
  static RULE_FN void moments(const Scalars& c, Element& x) {
    average(x.m, c.c1, x.g);
    average(x.v, c.c2, square(x.g));
  }
  template <class Out> static RULE_FN void stats(const Scalars&, const Element& x, Out& out) {
    out.add(SUM, x.v, 1);
    out.add(SQUARES, x.v, x.v);
    out.least(LEAST - sums, x.v);
  }
  // v -> sqrt(scale*v + eps) is monotone, so that the layer's least v gives the least w: one round of stats does.
  static RULE_FN void finish(const Group& h, const Total& layer, Scalars& c) {
    double squared_cosine = 1, least = 0;
    if (layer.adapt && layer.elements > 0) {
      const double sum = layer.stats[SUM], squares = layer.stats[SQUARES];
      if (squares != 0) squared_cosine = sum * sum / (layer.elements * squares);
      least = std::sqrt(correction(h.beta2, layer.t) * squared_cosine * layer.stats[LEAST] + h.eps);
    }
    layer.report[0] = std::sqrt(squared_cosine), layer.report[1] = least;
    recall(h, layer, c);
  }
  static RULE_FN void recall(const Group& h, const Total& layer, Scalars& c) {
    c.scale = float(correction(h.beta2, layer.t) * (layer.report[0] * layer.report[0]));
    c.shift = float(layer.report[0] != 0 ? h.tau * layer.report[1] : -INFINITY);  // no report yet: w = inf, no way
  }
  static RULE_FN float direction(const Scalars& c, const Element& x) {
    const float w = root(c.scale * x.v + c.eps) - c.shift;
    return c.ic1 * x.m / w;
  }
  static RULE_FN void apply(const Scalars& c, Element& x) { x.p -= c.lr * direction(c, x) + c.decay * x.p; }
};

}  // namespace layerfused
