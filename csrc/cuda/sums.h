// Sums and minima over threads, chunks and layers, each in an order that depends on sizes alone.
#pragma once
#include "cuda/device.h"
#include "cuda/launch.h"

namespace layerfused::cuda {

constexpr int WARP = 32, WARPS = THREADS / WARP, MAX_STATS = 6;

template <int sums, int minima>
struct Stats {
  static constexpr int count = sums + minima;
  static_assert(count <= MAX_STATS, "raise MAX_STATS");
  double sum[sums > 0 ? sums : 1];
  float least[minima > 0 ? minima : 1];

  DEVICE Stats() {
    for (double& x : sum) x = 0;
    for (float& x : least) x = INFINITY;
  }
  DEVICE double get(int k) const { return k < sums ? sum[k] : least[k - sums]; }
  DEVICE void set(int k, double x) {
    if (k < sums) sum[k] = x;
    else least[k - sums] = float(x);
  }
  DEVICE void add(int k, double x) { set(k, k < sums ? get(k) + x : x < get(k) ? x : get(k)); }
};

// A thread's share, as a rule's `stats` sees it. What is not inside of the chunk adds nothing.
template <class S>
struct Share {
  S& stats;
  bool inside;
  DEVICE void add(int k, float a, float b) {
    if (inside) stats.sum[k] = device::add_product(stats.sum[k], a, b);
  }
  DEVICE void least(int k, float a) {
    if (inside && a < stats.least[k]) stats.least[k] = a;
  }
};

// One number of each warp.
using Board = double[MAX_STATS][WARPS];

// The block's stats, for every thread of it. Between two uses of a board there is a barrier.
template <class S>
DEVICE S total(S own, Board& board) {
#pragma unroll
  for (int k = 0; k < S::count; ++k) {
#pragma unroll
    for (int distance = WARP / 2; distance > 0; distance /= 2) own.add(k, device::from_lane(own.get(k), distance));
    if (device::thread() % WARP == 0) board[k][device::thread() / WARP] = own.get(k);
  }
  device::barrier();  // publishes every warp's number; and what the block wrote, to whoever speaks for it
#pragma unroll
  for (int k = 0; k < S::count; ++k) {
    own.set(k, board[k][0]);
#pragma unroll
    for (int warp = 1; warp < WARPS; ++warp) own.add(k, board[k][warp]);
  }
  return own;
}

// The stats of many chunks, from `first` on: each thread takes every THREADS-th, then the block adds up.
template <class S>
DEVICE S total_of(const double* partials, int64_t first, int64_t chunks, Board& board) {
  S own;
  for (int64_t c = device::thread(); c < chunks; c += THREADS)
#pragma unroll
    for (int k = 0; k < S::count; ++k) own.add(k, partials[(first + c) * S::count + k]);
  return total(own, board);
}

}  // namespace layerfused::cuda
