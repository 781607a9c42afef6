// The grid, CUDA's runtime and the counting of bytes, for the host. What tests steer is `extern "C"`, for ctypes.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdlib>
#include <deque>
#include <map>
#include <random>
#include <set>
#include <string>

#include "grid.h"

#if defined(SHIM_THREADS)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <climits>
#include <thread>
#else
#include <setjmp.h>
#include <ucontext.h>
#endif

#define TEST_STEERS extern "C" __attribute__((visibility("default")))

namespace shim {
namespace {

std::mt19937 generator;

Block make_block(int number, int threads) {
  Block block{number, threads, {}, {}, std::vector<double>(2 * size_t(threads)), nullptr};
  block.all.size = threads;
  block.warps.resize(size_t(threads / WARP));
  for (Meeting& warp : block.warps) warp.size = WARP;
  block.memory = std::make_unique<Memory>();
  memset(block.memory->bytes, 0xFF, sizeof(Memory));  // NaN, -1
  return block;
}

}  // namespace

void* block_memory(size_t bytes) {
  if (bytes > sizeof(Memory)) abort();
  return self().block->memory->bytes;
}

#if defined(SHIM_THREADS)

Self& self() {
  static thread_local Self own;
  return own;
}
void yield() { std::this_thread::yield(); }

// As std::barrier, but who waits sleeps at once: libstdc++'s spins first, which with hundreds of threads on a few cores
// takes most of the time. What was written before is released by the arrival or the round, and acquired by both.
void meet(Meeting& meeting) {
  std::atomic_ref<int> arrived(meeting.arrived), now(meeting.round);
  const int round = now.load(std::memory_order_relaxed);
  if (arrived.fetch_add(1, std::memory_order_acq_rel) == meeting.size - 1) {
    arrived.store(0, std::memory_order_relaxed);
    now.store(round + 1, std::memory_order_release);
    syscall(SYS_futex, &meeting.round, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
  }
  while (now.load(std::memory_order_acquire) == round)
    syscall(SYS_futex, &meeting.round, FUTEX_WAIT_PRIVATE, round, nullptr, nullptr, 0);
}

void run(int blocks, int threads, const std::function<void()>& kernel) {
  std::vector<Block> grid;
  for (int b = 0; b < blocks; ++b) grid.push_back(make_block(b, threads));
  std::vector<std::thread> team;
  for (Block& block : grid)
    for (int t = 0; t < threads; ++t)
      team.emplace_back([&, t] {
        self() = {&block, t, blocks, 0};
        kernel();
      });
  for (std::thread& member : team) member.join();
}

#else

namespace {

struct Fiber {
  Self self;
  std::unique_ptr<char[]> stack;
  jmp_buf place;
  bool begun = false, done = false;
};
Fiber* current = nullptr;
jmp_buf scheduler;
const std::function<void()>* body = nullptr;

void begin() {
  (*body)();
  current->done = true;
  _longjmp(scheduler, 1);
}

void resume(Fiber& fiber) {
  current = &fiber;
  if (_setjmp(scheduler)) return;
  if (fiber.begun) _longjmp(fiber.place, 1);
  fiber.begun = true;
  constexpr size_t stack = 64 * 1024;
  fiber.stack.reset(new char[stack]);
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = fiber.stack.get(), context.uc_stack.ss_size = stack, context.uc_link = nullptr;
  makecontext(&context, begin, 0);
  setcontext(&context);
}

}  // namespace

Self& self() { return current->self; }
void yield() {
  if (!_setjmp(current->place)) _longjmp(scheduler, 1);
}
void meet(Meeting& meeting) {
  const int round = meeting.round;
  if (++meeting.arrived == meeting.size) meeting.arrived = 0, ++meeting.round;
  while (meeting.round == round) yield();
}

// One block after the other lets each of its threads go on to its next stop.
void run(int blocks, int threads, const std::function<void()>& kernel) {
  body = &kernel;
  std::vector<Block> grid;
  for (int b = 0; b < blocks; ++b) grid.push_back(make_block(b, threads));
  std::vector<std::vector<Fiber>> fibers(static_cast<size_t>(blocks));
  for (int b = 0; b < blocks; ++b) {
    fibers[size_t(b)] = std::vector<Fiber>(size_t(threads));
    for (int t = 0; t < threads; ++t) fibers[size_t(b)][size_t(t)].self = {&grid[size_t(b)], t, blocks, 0};
  }
  while (!fibers.empty()) {
    const size_t chosen = generator() % fibers.size();
    bool left = false;
    for (Fiber& fiber : fibers[chosen])
      if (!fiber.done) resume(fiber), left |= !fiber.done;
    if (!left) fibers.erase(fibers.begin() + std::ptrdiff_t(chosen));
  }
}

#endif

}  // namespace shim

struct Event {
  int64_t number = 0;
};

namespace {

int device = 0, multiprocessors = 2, failing = 0;
bool deferred = false, capturing = false;
int64_t queued = 0, done = 0, launches = 0, copies = 0, allocations = 0, waits = 0;
std::deque<std::function<void()>> queue;
std::vector<std::function<void()>> captured;
std::set<const void*> pinned;

// The `failing`-th call from now on fails: of those that can on a healthy device.
bool fails() { return failing > 0 && --failing == 0; }

void enqueue(std::function<void()> work) {
  if (capturing) return captured.push_back(std::move(work));
  ++queued;
  queue.push_back(std::move(work));
  while (!deferred && !queue.empty()) queue.front()(), queue.pop_front(), ++done;
}

void run_until(int64_t number) {
  while (done < number) queue.front()(), queue.pop_front(), ++done;
}

}  // namespace

TEST_STEERS void shim_seed(unsigned seed) { shim::generator.seed(seed); }
TEST_STEERS void shim_defer(int yes) {
  deferred = yes;
  if (!yes) run_until(queued);
}
TEST_STEERS void shim_capture(int yes) {
  capturing = yes;
  if (yes) captured.clear();
}
// What was captured last is run once more, as it was then.
TEST_STEERS void shim_replay() {
  for (const auto& work : captured) enqueue(work);
}
TEST_STEERS void shim_fail(int call) { failing = call; }
TEST_STEERS void shim_current_device(int number) { device = number; }
TEST_STEERS int shim_device() { return device; }
// Launches, copies, allocations of pinned memory, waits for events so far.
TEST_STEERS void shim_counts(int64_t* counts) {
  counts[0] = launches, counts[1] = copies, counts[2] = allocations, counts[3] = waits;
}

cudaError_t shim::launch(int blocks, int threads, std::function<void()> kernel) {
  if (fails()) return cudaErrorNoKernelImageForDevice;
  ++launches;
  enqueue([=, kernel = std::move(kernel)] { run(blocks, threads, kernel); });
  return cudaSuccess;
}

cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorName(cudaError_t error) {
  return error == cudaErrorMemoryAllocation ? "cudaErrorMemoryAllocation" : "cudaErrorNoKernelImageForDevice";
}
const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorMemoryAllocation ? "out of memory" : "no kernel image is available for execution on the device";
}
cudaError_t cudaGetDevice(int* number) { return *number = device, cudaSuccess; }
cudaError_t cudaSetDevice(int number) { return device = number, cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) { return *value = multiprocessors, cudaSuccess; }
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, size_t) {
  return *blocks = 1, cudaSuccess;
}
cudaError_t cudaHostAlloc(void** memory, size_t bytes, unsigned) {
  if (fails()) return cudaErrorMemoryAllocation;
  ++allocations;
  pinned.insert(*memory = malloc(bytes));
  return cudaSuccess;
}
cudaError_t cudaFreeHost(void* memory) { return pinned.erase(memory), free(memory), cudaSuccess; }
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  ++copies;
  if (pinned.count(from)) return enqueue([=] { memcpy(to, from, bytes); }), cudaSuccess;
  const std::string staged(static_cast<const char*>(from), bytes);  // what is not pinned is read before the call returns
  enqueue([=] { memcpy(to, staged.data(), bytes); });
  return cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) { return *event = new Event, cudaSuccess; }
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t) { return event->number = queued, cudaSuccess; }
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  waits += done < event->number;
  return run_until(event->number), cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t event) { return delete event, cudaSuccess; }
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  return *status = capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone, cudaSuccess;
}
