// The vocabulary of a rule: what one optimizer's mathematics may see and say.
//
// A rule is a struct of static functions without pointers, indices or storage types:
//   start(h, t)            the scalars that do not depend on the layer's sums
//   moments(c, x)          elementwise, before the sums are taken
//   stats(c, x, out)       the layer's terms: out.add(k, a, b) sums a*b, out.least(k, a) keeps the minimum
//   finish(h, layer, c)    once per layer, in double: from sums to the scalars of `apply`
//   direction(c, x)        where `apply` goes beside the decay, as of m and v; `c.lr` is how far
//   apply(c, x)            elementwise, after `finish`
//   recall(h, layer, c)    only where `direction` uses what `finish` found: those scalars, from the layer's report
// The engine hands in x.g with sign, loss scale, global clip factor and coupled decay (`Scalars::coupled`) applied.
// `reduce_sweep` and `apply_sweep` name the operands that each of the two sweeps reads and writes.
#pragma once
#include <cmath>
#include <type_traits>

#if defined(__CUDACC__)
#define RULE_FN __host__ __device__ __forceinline__
#else
#define RULE_FN inline __attribute__((always_inline))
#endif

namespace layerfused {

struct Element {
  float p, g, m, v;
};

// P is the true weight. Where a launch leads, it lies in a copy, and PREDICTED is the parameter itself.
enum Operand : unsigned { P = 1, G = 2, M = 4, V = 8, PREDICTED = 16 };

struct Sweep {
  unsigned reads, writes;
};

// What `finish` knows of its layer.
struct Total {
  const double* stats;  // the sums, then the minima, in the order of `stats`
  double elements;      // of the whole layer
  double t;             // this step's number, from 1; of `recall` the last step's
  bool adapt;           // false: no layer-wise factor (the stats are not there then)
  double* state;        // the rule's float64 layer state, nullptr if it has none
  double* report;       // for layer_stats(), in the rule's order; kept until the next step
};

// A binary power, so that host and device agree to the last bit (pow() does not).
RULE_FN double power(double base, double t) {
  double result = 1;
  for (long long n = static_cast<long long>(t); n > 0; n >>= 1, base *= base)
    if (n & 1) result *= base;
  return result;
}

// 1 / (1 - beta^t): makes an average that started at 0 unbiased.
RULE_FN double correction(double beta, double t) { return 1 / (1 - power(beta, t)); }

// An average moves by c = 1 - beta, rounded once from double: beta*v + (1 - beta)*q with both rounded drifts.
RULE_FN void average(float& v, float c, float q) { v += c * (q - v); }

RULE_FN float root(float x) { return sqrtf(x); }
RULE_FN float square(float x) { return x * x; }

// What engines ask of a rule beside: whether its scalars have a coupled decay, which adds to the gradient and makes a
// sweep that reads g read p too.
template <class S, class = void>
constexpr bool couples = false;
template <class S>
constexpr bool couples<S, std::void_t<decltype(S::coupled)>> = true;

template <class S>
RULE_FN float coupled(const S& c) {
  if constexpr (couples<S>) return c.coupled;
  return 0;
}

template <class R>
RULE_FN constexpr unsigned with_p(unsigned reads) {
  return couples<typename R::Scalars> && (reads & G) ? reads | P : reads;
}

template <class R, class = void>
constexpr bool recalls = false;
template <class R>
constexpr bool recalls<R, std::void_t<decltype(&R::recall)>> = true;

// The scalars by which `direction` was taken in the last step, with what else the group's row says now.
template <class R>
RULE_FN void recall(const typename R::Group& h, const Total& layer, typename R::Scalars& c) {
  if constexpr (recalls<R>) R::recall(h, layer, c);
}

// What `direction` needs of memory: the states that `apply` goes by, beside the weight that it starts from.
template <class R>
constexpr unsigned predict_reads = P | (R::apply_sweep.reads & (M | V));

// `ahead` steps on from the weight x.p, at the lr in force.
template <class R>
RULE_FN float predicted(const typename R::Scalars& c, const Element& x, float ahead) {
  return x.p - ahead * c.lr * R::direction(c, x);
}

// Both sweeps in one: of a layer without stats, or of one that stays on chip.
template <class R>
constexpr Sweep both_sweep{R::reduce_sweep.reads | R::apply_sweep.reads,
                           R::reduce_sweep.writes | R::apply_sweep.writes};

}  // namespace layerfused
