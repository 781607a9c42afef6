// Every access of the kernels to memory that a test watches, counted: -fsanitize=thread has the compiler report each
// load and store, and here the reports end instead of in ThreadSanitizer. So no source has to count for itself.
#include <atomic>
#include <cstdint>
#include <map>

#define REPORT extern "C" __attribute__((visibility("hidden")))
#define TEST_STEERS extern "C" __attribute__((visibility("default")))

namespace {

struct Range {
  uintptr_t end;
  int64_t read = 0, written = 0;
};
std::map<uintptr_t, Range> ranges;  // by their first byte

Range* range_of(const void* at) {
  const auto address = reinterpret_cast<uintptr_t>(at);
  auto found = ranges.upper_bound(address);
  return found != ranges.begin() && address < (--found)->second.end ? &found->second : nullptr;
}

void read(const void* at, int64_t bytes) {
  if (ranges.empty()) return;
  if (Range* range = range_of(at)) range->read += bytes;
}

void written(const void* at, int64_t bytes) {
  if (ranges.empty()) return;
  if (Range* range = range_of(at)) range->written += bytes;
}

}  // namespace

TEST_STEERS void shim_watch(uintptr_t begin, int64_t bytes) { ranges[begin] = {begin + uintptr_t(bytes)}; }
TEST_STEERS void shim_forget() { ranges.clear(); }
TEST_STEERS void shim_seen(uintptr_t begin, int64_t* counts) {
  counts[0] = ranges.at(begin).read, counts[1] = ranges.at(begin).written;
}

#define REPORTS_OF(n)                                                  \
  REPORT void __tsan_read##n(void* at) { read(at, n); }                \
  REPORT void __tsan_write##n(void* at) { written(at, n); }            \
  REPORT void __tsan_unaligned_read##n(void* at) { read(at, n); }      \
  REPORT void __tsan_unaligned_write##n(void* at) { written(at, n); }
REPORTS_OF(1)
REPORTS_OF(2)
REPORTS_OF(4)
REPORTS_OF(8)
REPORTS_OF(16)
REPORT void __tsan_read_range(void* at, unsigned long bytes) { read(at, int64_t(bytes)); }
REPORT void __tsan_write_range(void* at, unsigned long bytes) { written(at, int64_t(bytes)); }
REPORT void __tsan_vptr_update(void**, void*) {}
REPORT void __tsan_init() {}
REPORT void __tsan_func_entry(void*) {}
REPORT void __tsan_func_exit() {}
REPORT uint32_t __tsan_atomic32_fetch_add(uint32_t* at, uint32_t x, int) {
  return __atomic_fetch_add(at, x, __ATOMIC_SEQ_CST);
}
REPORT uint32_t __tsan_atomic32_load(const uint32_t* at, int) { return __atomic_load_n(at, __ATOMIC_SEQ_CST); }
REPORT void __tsan_atomic32_store(uint32_t* at, uint32_t x, int) { __atomic_store_n(at, x, __ATOMIC_SEQ_CST); }
REPORT uint8_t __tsan_atomic8_load(const uint8_t* at, int) { return __atomic_load_n(at, __ATOMIC_SEQ_CST); }
