// Aida (Zhang et al., arXiv 2203.13273; author code): K mutual projections of each layer's gradient and momentum.
#pragma once
#include "rule.h"

namespace layerfused {

struct aida {
  struct Group { double lr, beta1, beta2, eps, weight_decay, k, xi, decoupled; };
  struct Scalars { float coupled, c1, c2, ic1, ic2, eps, lr, decay, a, b; };
  static constexpr Sweep reduce_sweep{G | M, M}, apply_sweep{P | G | M | V, P | V};
  enum { GG, MM, GM };
  static constexpr int sums = 3, minima = 0, reports = 3;

  static RULE_FN Scalars start(const Group& h, double t) {
    const bool decoupled = h.decoupled != 0;
    return {float(decoupled ? 0 : h.weight_decay), float(1 - h.beta1), float(1 - h.beta2),
            float(correction(h.beta1, t)), float(correction(h.beta2, t)), float(h.eps), float(h.lr),
            float(decoupled ? h.lr * h.weight_decay : 0), 1, 1};
  }
  static RULE_FN void moments(const Scalars& c, Element& x) { average(x.m, c.c1, x.g); }
  template <class Out> static RULE_FN void stats(const Scalars&, const Element& x, Out& out) {
    out.add(GG, x.g, x.g);
    out.add(MM, x.m, x.m);
    out.add(GM, x.g, x.m);
  }
  // Every iterate is a multiple of g or m, so that K projections need no further sweep: r = b*m - a*g.
  static RULE_FN void finish(const Group& h, const Total& layer, Scalars& c) {
    double a = 1, b = 1, norm_g = 0, norm_m = 0, cosine = 0;
    if (layer.adapt) {
      const double gg = layer.stats[GG], mm = layer.stats[MM], gm = layer.stats[GM];
      for (int k = 0; k < static_cast<int>(h.k); ++k) {
        const double s = a * b * gm;  // of the old a and b both
        a = a * s / (a * a * gg + h.xi);
        b = b * s / (b * b * mm + h.xi);
      }
      norm_g = std::sqrt(gg), norm_m = std::sqrt(mm);
      cosine = norm_g != 0 && norm_m != 0 ? gm / (norm_g * norm_m) : 0;
    }
    c.a = float(a), c.b = float(b);
    layer.report[0] = norm_g, layer.report[1] = norm_m, layer.report[2] = cosine;
  }
  static RULE_FN float direction(const Scalars& c, const Element& x) { return c.ic1 * x.m / root(c.ic2 * x.v); }
  static RULE_FN void apply(const Scalars& c, Element& x) {
    average(x.v, c.c2, square(c.b * x.m - c.a * x.g));
    x.v += c.eps;
    x.p -= c.lr * direction(c, x) + c.decay * x.p;
  }
};

}  // namespace layerfused
