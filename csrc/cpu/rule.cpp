// One rule for the CPU: compiled once for each header of csrc/rules, named on the command line.
#include LAYERFUSED_RULE_HEADER

#include "cpu/clones.h"
#include "cpu/kernels.h"

#define RULE_LAMBDA __attribute__((always_inline))

namespace layerfused {
namespace {

template <class R, unsigned reads>
RULE_FN Element load(const typename R::Scalars& c, float scale, const Tile& tile, int64_t i) {
  Element x{0, 0, 0, 0};
  if constexpr (reads & P) x.p = tile.p[i];
  if constexpr (reads & G) x.g = scale * tile.g[i];
  if constexpr (reads & M) x.m = tile.m[i];
  if constexpr (reads & V) x.v = tile.v[i];
  if constexpr (couples<typename R::Scalars> && (reads & G)) x.g = c.coupled != 0 ? x.g + c.coupled * x.p : x.g;
  return x;
}

template <unsigned writes>
RULE_FN void store(const Tile& tile, int64_t i, const Element& x) {
  if constexpr (writes & P) tile.p[i] = x.p;
  if constexpr (writes & M) tile.m[i] = x.m;
  if constexpr (writes & V) tile.v[i] = x.v;
}

// Calls element(i, lane) for each i below n. The lanes of a row are what the vectoriser works on.
template <bool leads = false, class F>
RULE_FN void for_each(const Stretch& stretch, F&& element) {
  const Tile ahead = stretch.ahead;
  const int64_t n = stretch.n;
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) {
    __builtin_prefetch(ahead.p + i);
    __builtin_prefetch(ahead.g + i);
    __builtin_prefetch(ahead.m + i);
    __builtin_prefetch(ahead.v + i);
    if constexpr (leads) __builtin_prefetch(ahead.predicted + i, 1);
#pragma GCC ivdep
#pragma GCC unroll 1  // unrolled before the vectoriser sees it, this loop becomes scalar code (5 times slower)
    for (int j = 0; j < LANES; ++j) element(i + j, j);
  }
  for (int j = 0; i + j < n; ++j) element(i + j, j);
}

// The accumulators of a chunk, as one lane sees them.
template <class R>
struct Lane {
  double (&sum)[R::sums > 0 ? R::sums : 1][LANES];
  float (&minimum)[R::minima > 0 ? R::minima : 1][LANES];
  int j;
  RULE_FN void add(int k, float a, float b) { sum[k][j] += double(a) * double(b); }
  RULE_FN void least(int k, float a) { minimum[k][j] = a < minimum[k][j] ? a : minimum[k][j]; }
};

template <class R>
CLONES void reduce(const Scalars& erased, float scale, const Stretch& stretch, Lanes& lanes) {
  constexpr unsigned reads = with_p<R>(R::reduce_sweep.reads);
  const auto c = reinterpret_cast<const typename R::Scalars&>(erased);
  const Tile tile = stretch.tile;
  double sum[R::sums > 0 ? R::sums : 1][LANES];
  float minimum[R::minima > 0 ? R::minima : 1][LANES];
  for (int k = 0; k < R::sums; ++k)
    for (int j = 0; j < LANES; ++j) sum[k][j] = lanes.sum[k][j];
  for (int k = 0; k < R::minima; ++k)
    for (int j = 0; j < LANES; ++j) minimum[k][j] = lanes.least[k][j];
  for_each(stretch, [&](int64_t i, int j) RULE_LAMBDA {
    Element x = load<R, reads>(c, scale, tile, i);
    R::moments(c, x);
    Lane<R> out{sum, minimum, j};
    R::stats(c, x, out);
    store<R::reduce_sweep.writes>(tile, i, x);
  });
  for (int k = 0; k < R::sums; ++k)
    for (int j = 0; j < LANES; ++j) lanes.sum[k][j] = sum[k][j];
  for (int k = 0; k < R::minima; ++k)
    for (int j = 0; j < LANES; ++j) lanes.least[k][j] = minimum[k][j];
}

template <class R, bool with_moments, bool leads>
CLONES void update(const Scalars& erased, float scale, [[maybe_unused]] float ahead, const Stretch& stretch) {
  constexpr Sweep operands = with_moments ? both_sweep<R> : R::apply_sweep;
  constexpr unsigned reads = with_p<R>(operands.reads);
  const auto c = reinterpret_cast<const typename R::Scalars&>(erased);
  const Tile tile = stretch.tile;
  for_each<leads>(stretch, [&](int64_t i, int) RULE_LAMBDA {
    Element x = load<R, reads>(c, scale, tile, i);
    if constexpr (with_moments) R::moments(c, x);
    R::apply(c, x);
    store<operands.writes>(tile, i, x);
    if constexpr (leads) tile.predicted[i] = predicted<R>(c, x, ahead);
  });
}

template <class R>
CLONES void predict(const Scalars& erased, float ahead, const Stretch& stretch) {
  const auto c = reinterpret_cast<const typename R::Scalars&>(erased);
  const Tile tile = stretch.tile;
  for_each<true>(stretch, [&](int64_t i, int) RULE_LAMBDA {
    tile.predicted[i] = predicted<R>(c, load<R, predict_reads<R>>(c, 1, tile, i), ahead);
  });
}

template <class R>
struct Register {
  using Group = typename R::Group;
  using S = typename R::Scalars;
  static_assert(sizeof(S) <= sizeof(Scalars), "a rule has at most 16 scalars: raise Scalars::values");
  static_assert(R::sums <= MAX_SUMS && R::minima <= MAX_MINIMA && R::reports <= MAX_REPORTS, "raise MAX_* in kernels.h");

  static void start(const double* group, double t, Scalars& c) {
    reinterpret_cast<S&>(c) = R::start(*reinterpret_cast<const Group*>(group), t);
  }
  static void finish(const double* group, const Total& layer, Scalars& c) {
    R::finish(*reinterpret_cast<const Group*>(group), layer, reinterpret_cast<S&>(c));
  }
  static void recall_of(const double* group, const Total& layer, Scalars& c) {
    recall<R>(*reinterpret_cast<const Group*>(group), layer, reinterpret_cast<S&>(c));
  }
  static float coupled_of(const Scalars& c) { return coupled(reinterpret_cast<const S&>(c)); }

  explicit Register(const char* name) {
    static const Kernels kernels{name, int(sizeof(Group) / sizeof(double)), R::sums, R::minima, R::reports, couples<S>,
                                 R::reduce_sweep, R::apply_sweep, start, finish, recall_of, coupled_of, reduce<R>,
                                 update<R, false, false>, update<R, false, true>, update<R, true, false>,
                                 update<R, true, true>, predict_reads<R>, predict<R>};
    rules().push_back(&kernels);
  }
};

#define TEXT_OF(x) #x
#define TEXT(x) TEXT_OF(x)
const Register<LAYERFUSED_RULE> registered(TEXT(LAYERFUSED_RULE));

}  // namespace
}  // namespace layerfused
