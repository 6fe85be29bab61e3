// Blocks run one after the other, the threads of a block as fibers in an order that a seed sets. A fiber gives way
// only at barriers and at warp-wide operations. What this sees: wrong indices and bounds (with the sanitizers),
// missing barriers and waits (stale or NaN data, in some order of the threads), warps that part ways, shared memory
// that was never written. What it cannot see: two threads that race within one stretch between barriers.
// What is asynchronous on the device happens between the stretches, also in an order that the seed sets.
#include "emulator.h"

#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <random>
#include <vector>

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emulation {
namespace {

constexpr size_t kStackBytes = 128 * 1024;
constexpr int kWarp = 32;
constexpr size_t kSharedWithoutAsking = 48 * 1024;
constexpr size_t kSharedAtMost = 227 * 1024;    // of compute capability 9.0 and 10.0
constexpr size_t kSharedElsewhere = 99 * 1024;  // of 8.6, 8.9 and 12.0, the least of all

struct Copy {
  void* shared;
  const void* global;
  size_t bytes;
  bool valid;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  std::vector<Copy> copies;
  uint3 index;
  bool done = false;
};

struct Warp {
  Perform perform = nullptr;
  void* arguments[kWarp];
  int arrived = 0;
};

alignas(1024) unsigned char shared[kSharedAtMost];
size_t shared_bytes = 0;
std::map<const void*, size_t> allowed_shared;
std::mt19937 random_order;

std::vector<Fiber> fibers;  // kept from block to block, for their stacks
std::vector<Warp> warps;
std::vector<int> ready;
std::vector<int> at_barrier;
std::vector<std::function<void()>> events;
int current = -1;
int alive = 0;
const std::function<void()>* thread_body = nullptr;

ucontext_t scheduler;
const void* scheduler_stack = nullptr;
size_t scheduler_stack_bytes = 0;

// Back to the scheduler, until it picks this fiber again.
void give_way(bool for_good = false) {
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(for_good ? nullptr : &fake_stack, scheduler_stack, scheduler_stack_bytes);
  swapcontext(&fibers[current].context, &scheduler);
  __sanitizer_finish_switch_fiber(fake_stack, &scheduler_stack, &scheduler_stack_bytes);
}

void fiber_main() {
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
  (*thread_body)();
  Fiber& self = fibers[current];
  if (!self.copies.empty()) fail("a thread ends with asynchronous copies under way");
  self.done = true;
  --alive;
  give_way(true);
}

void resume(int index) {
  current = index;
  Fiber& fiber = fibers[index];
  threadIdx = fiber.index;
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, fiber.stack.get(), kStackBytes);
  swapcontext(&scheduler, &fiber.context);
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
}

// One of the events that have been started, any of them.
void run_event() {
  std::swap(events[random_order() % events.size()], events.back());
  const std::function<void()> event = std::move(events.back());
  events.pop_back();
  event();
}

void run_block(int threads) {
  __asan_unpoison_memory_region(shared, sizeof(shared));
  std::memset(shared, 0xff, sizeof(shared));  // NaN in every type
  __asan_poison_memory_region(shared + shared_bytes, sizeof(shared) - shared_bytes);

  if (static_cast<int>(fibers.size()) < threads) fibers.resize(threads);
  warps.assign(threads / kWarp, Warp{});
  ready.clear();
  at_barrier.clear();
  begin_hopper_block(threads);
  alive = threads;
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = fibers[i];
    fiber.done = false;
    fiber.index = {static_cast<unsigned>(i), 0, 0};
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, fiber_main, 0);
    ready.push_back(i);
  }
  while (alive > 0) {
    if (!events.empty() && (ready.empty() || random_order() % 16 == 0)) run_event();
    if (ready.empty() && !events.empty()) continue;
    if (ready.empty()) fail(stuck_hopper_block());
    std::swap(ready[random_order() % ready.size()], ready.back());
    const int next = ready.back();
    ready.pop_back();
    resume(next);
  }
  if (!events.empty()) fail("a block ends with loads of the copy engine under way");
  end_hopper_block();
}

}  // namespace

Device device;

void set_seed(unsigned seed) { random_order.seed(seed); }

void fail(const std::string& reason) {
  std::fprintf(stderr, "emulation: %s (block %u, thread %u)\n", reason.c_str(), blockIdx.x, threadIdx.x);
  std::_Exit(4);
}

int thread() { return current; }
int lane() { return current % kWarp; }

unsigned random_below(unsigned count) { return random_order() % count; }

void start_event(std::function<void()> event) { events.push_back(std::move(event)); }

void wait_in(std::vector<int>& queue) {
  queue.push_back(current);
  give_way();
}

void wake(std::vector<int>& queue) {
  ready.insert(ready.end(), queue.begin(), queue.end());
  queue.clear();
}

void meet_warp(Perform perform, void* argument) {
  const int first = current / kWarp * kWarp;
  Warp& warp = warps[current / kWarp];
  if (warp.arrived > 0 && warp.perform != perform) fail("lanes of one warp meet in different operations");
  warp.perform = perform;
  warp.arguments[lane()] = argument;
  if (++warp.arrived < kWarp) return give_way();
  perform(warp.arguments);
  warp.arrived = 0;
  for (int i = first; i < first + kWarp; ++i) {
    if (i != current) ready.push_back(i);
  }
}

void* shared_memory() { return shared; }

void check_shared(const void* address, size_t bytes) {
  const auto* first = static_cast<const unsigned char*>(address);
  if (first < shared || first + bytes > shared + shared_bytes) fail("an address is not in shared memory");
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0) fail("an address in shared memory is not aligned");
}

void start_copy(void* target, const void* global, size_t bytes, bool valid) {
  check_shared(target, bytes);
  if (reinterpret_cast<uintptr_t>(global) % bytes != 0) fail("an asynchronous copy reads from an unaligned address");
  std::memset(target, 0xff, bytes);
  fibers[current].copies.push_back({target, global, bytes, valid});
}

void finish_copies() {
  for (const Copy& copy : fibers[current].copies) {
    if (copy.valid) {
      std::memcpy(copy.shared, copy.global, copy.bytes);
    } else {
      std::memset(copy.shared, 0, copy.bytes);
    }
  }
  fibers[current].copies.clear();
}

cudaError_t allow_shared_memory(const void* kernel, int bytes) {
  const bool much = device.minor == 0 && (device.major == 9 || device.major == 10);
  if (bytes > static_cast<int>(much ? kSharedAtMost : kSharedElsewhere)) return cudaErrorInvalidValue;
  allowed_shared[kernel] = bytes;
  return cudaSuccess;
}

cudaError_t launch(const void* kernel, const cudaLaunchConfig_t& config, const std::function<void()>& thread) {
  const size_t allowed = std::max(kSharedWithoutAsking, allowed_shared[kernel]);
  const int threads = config.blockDim.x;
  if (config.dynamicSmemBytes > allowed) return cudaErrorInvalidValue;
  if (threads < 1 || threads > 1024 || config.gridDim.x < 1 || config.gridDim.y < 1 || config.gridDim.y > 65535) {
    return cudaErrorInvalidConfiguration;
  }
  if (threads % kWarp != 0) fail("the block is not made of whole warps");
  shared_bytes = config.dynamicSmemBytes;
  thread_body = &thread;
  blockDim = config.blockDim;
  gridDim = config.gridDim;
  for (unsigned y = 0; y < gridDim.y; ++y) {
    for (unsigned x = 0; x < gridDim.x; ++x) {
      blockIdx = {x, y, 0};
      run_block(threads);
    }
  }
  return cudaSuccess;
}

cudaError_t load(const void*) { return device.load_error; }

}  // namespace emulation

void __syncthreads() {
  using namespace emulation;
  if (at_barrier.size() + 1 < blockDim.x) return wait_in(at_barrier);
  wake(at_barrier);
}

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorInsufficientDriver: return "CUDA driver version is insufficient for CUDA runtime version";
    case cudaErrorNoKernelImageForDevice: return "no kernel image is available for execution on the device";
    default: return "an emulated error";
  }
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = emulation::device.major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = emulation::device.minor; break;
    case cudaDevAttrMultiProcessorCount: *value = emulation::device.multiprocessors; break;
  }
  return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  std::snprintf(properties->name, sizeof(properties->name), "%s", emulation::device.name);
  return cudaSuccess;
}
