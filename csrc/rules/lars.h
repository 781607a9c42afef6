// LARS (You et al., arXiv 1708.03888, Algorithm 1); lr_in_momentum is the paper's and MLPerf's placement of lr.
#pragma once
#include "rule.h"

namespace layerfused {

struct lars {
  struct Group {
    double lr, momentum, weight_decay, trust_coefficient, eps, nesterov, lr_in_momentum, larc;
  };
  struct Scalars { float momentum, weight_decay, nesterov, take, lr; };
  static constexpr Sweep reduce_sweep{P | G, 0}, apply_sweep{P | G | M, P | M};
  enum { PP, GG };
  static constexpr int sums = 2, minima = 0, reports = 3;

  static RULE_FN Scalars start(const Group& h, double) {
    const bool inside = h.lr_in_momentum != 0;
    return {float(h.momentum), float(h.weight_decay), float(h.nesterov), float(inside ? h.lr : 1),
            float(inside ? 1 : h.lr)};
  }
  static RULE_FN void moments(const Scalars&, Element&) {}
  template <class Out> static RULE_FN void stats(const Scalars&, const Element& x, Out& out) {
    out.add(PP, x.p, x.p);
    out.add(GG, x.g, x.g);
  }
  static RULE_FN void finish(const Group& h, const Total& layer, Scalars& c) {
    double norm_p = 0, norm_g = 0, ratio = 1;
    if (layer.adapt) {
      norm_p = std::sqrt(layer.stats[PP]), norm_g = std::sqrt(layer.stats[GG]);
      if (norm_p != 0 && norm_g != 0) {
        ratio = h.trust_coefficient * norm_p / (norm_g + h.weight_decay * norm_p + h.eps);
        if (h.larc != 0 && ratio > h.lr) ratio = 1;
        else if (h.larc != 0) ratio /= h.lr;
      }
    }
    c.take = float(ratio * (h.lr_in_momentum != 0 ? h.lr : 1));
    layer.report[0] = norm_p, layer.report[1] = norm_g, layer.report[2] = ratio;
  }
  static RULE_FN float direction(const Scalars&, const Element& x) { return x.m; }
  static RULE_FN void apply(const Scalars& c, Element& x) {
    const float d = c.take * (x.g + c.weight_decay * x.p);
    x.m = c.momentum * x.m + d;
    x.p -= c.lr * (c.nesterov != 0 ? d + c.momentum * x.m : x.m);
  }
};

}  // namespace layerfused
