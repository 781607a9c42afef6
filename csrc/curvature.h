// Curvature step sizes (after Bahamou & Goldfarb, arXiv 2305.13664; the abstract fixes no formula: [ours]), what both of
// their launches say. The first finds the direction d and how steep the loss falls along it; then the gradient is taken
// once more, a little further along z = sign*d; the second finds from it the curvature along z, and how far to go.
#pragma once
#include "rule.h"

namespace layerfused::curvature {

// Each layer's row is one and the same for both launches; the host writes the sign.
enum Report { PARAM_NORM, DIRECTION_NORM, DESCENT, SLOPE, SIGN, CURVATURE, STEP_SIZE, REPORTS };

struct Settings {
  double ema, damping, max_step, self_concordant, signed_average;
  double reach, base;  // (second gradient - base * first) / reach is the product of the Hessian with z
};

RULE_FN bool finite(double x) { return x - x == 0; }

// rho = g.d / d.d, averaged. `decay` is what weight decay adds to the descent.
RULE_FN void find_slope(const Settings& h, const Total& layer, double pp, double dd, double descent, double decay) {
  double &average = *layer.state, *report = layer.report;
  const double rho = dd != 0 ? (descent + decay) / dd : 0;
  if (finite(rho)) average += (1 - h.ema) * (rho - average);
  report[PARAM_NORM] = std::sqrt(pp), report[DIRECTION_NORM] = std::sqrt(dd), report[DESCENT] = descent;
  report[SLOPE] = average * correction(h.ema, layer.t);
}

// kappa = z.Hz / z.z, averaged, and the step size. `along` is the second gradient along d, `decay` weight decay's share.
RULE_FN void find_step(const Settings& h, const Total& layer, double along, double decay) {
  double &average = *layer.state, *report = layer.report;
  const double norm = report[DIRECTION_NORM], dd = norm * norm, slope = report[SLOPE];
  const double kappa = (along - h.base * report[DESCENT]) / (h.reach * report[SIGN] * dd) + decay;
  const bool found = dd != 0 && finite(kappa);
  if (found) average += (1 - h.ema) * ((h.signed_average != 0 ? kappa : std::fabs(kappa)) - average);
  const double curvature = std::fabs(average) * correction(h.ema, layer.t), damped = curvature + h.damping;
  double step = 0;
  if (found && slope > 0) {
    const double fall = slope * dd, delta = norm * std::sqrt(damped);  // self-concordant: Gao & Goldfarb
    step = h.self_concordant != 0 ? fall / ((fall + delta) * delta) : slope / damped;
    if (!(step < h.max_step)) step = h.max_step;
  }
  report[CURVATURE] = curvature, report[STEP_SIZE] = step;
}

}  // namespace layerfused::curvature
