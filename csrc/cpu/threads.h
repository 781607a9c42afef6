// A team of workers, each with the default floating-point environment.
#pragma once
#include <thread>
#if defined(__x86_64__) || defined(__i386__)
#include <xmmintrin.h>
#endif
#if defined(LAYERFUSED_STD_THREADS)  // ThreadSanitizer does not see OpenMP's fork and join
#include <vector>
#endif

namespace layerfused {

// Subnormals count (algorithms.md, section 6) whatever the caller's thread was set to; restored on the way out.
class DefaultFloats {
 public:
#if defined(__x86_64__) || defined(__i386__)
  DefaultFloats() : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
  ~DefaultFloats() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#elif defined(__aarch64__)
  DefaultFloats() : saved_(__builtin_aarch64_get_fpcr()) { __builtin_aarch64_set_fpcr(0); }
  ~DefaultFloats() { __builtin_aarch64_set_fpcr(saved_); }

 private:
  unsigned saved_;
#endif
};

template <class Work>
void run_team(int threads, Work&& work) {
  const auto worker = [&] {
    DefaultFloats floats;
    work();
  };
  if (threads == 1) return worker();
#if defined(LAYERFUSED_STD_THREADS)
  std::vector<std::thread> team;
  for (int i = 1; i < threads; ++i) team.emplace_back(worker);
  worker();
  for (auto& member : team) member.join();
#else
#pragma omp parallel num_threads(threads)
  worker();
#endif
}

// Waits for an item with a smaller ticket, which some worker is running already.
template <class Condition>
void wait_until(Condition&& met) {
  for (int spins = 0; !met(); ++spins) {
    if (spins < 64) {
#if defined(__x86_64__) || defined(__i386__)
      _mm_pause();
#endif
    } else {
      std::this_thread::yield();  // with more workers than cores the other one may need this core
    }
  }
}

}  // namespace layerfused
