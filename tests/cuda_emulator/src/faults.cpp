// Kernels with one fault each, of a kind that a GPU would not report: the tests show that the emulation does.
#include "faults.h"

#include <kernels/cuda/arch.cuh>
#include <kernels/cuda/launch.cuh>

namespace haste::cuda {
namespace {

constexpr int kThreads = 64;

// target[i] = source[63 − i] through shared memory, with a barrier between, or without.
template <bool kWithBarrier>
__global__ void reverse(const float* source, float* target) {
  auto* shared = static_cast<float*>(dynamic_shared_memory());
  shared[threadIdx.x] = source[threadIdx.x];
  if (kWithBarrier) __syncthreads();
  target[threadIdx.x] = shared[kThreads - 1 - threadIdx.x];
}

// A copy of 16 bytes per thread, read before, or after, the thread waits for it.
template <bool kWithWait>
__global__ void copy(const float* source, float* target) {
  auto* shared = static_cast<float*>(dynamic_shared_memory());
  copy_async_16(shared + threadIdx.x * 4, source + threadIdx.x / 4 * 4, true);
  if (kWithWait) wait_for_copies();
  target[threadIdx.x] = shared[threadIdx.x * 4 + threadIdx.x % 4];
  wait_for_copies();
}

__global__ void read_past_the_end(const float* source, float* target) { target[threadIdx.x] = source[threadIdx.x + 1]; }

__global__ void divergent_warp(const float* source, float* target) {
  target[threadIdx.x] = source[threadIdx.x];
  if (threadIdx.x % 2 == 0) {
    __syncwarp();
  } else {
    target[threadIdx.x] = __shfl_xor_sync(kFullWarp, source[threadIdx.x], 1);
  }
}

__global__ void barrier_for_some(const float* source, float* target) {
  target[threadIdx.x] = source[threadIdx.x];
  if (threadIdx.x < kWarpSize) __syncthreads();
}

__global__ void exchange_neighbours(const float* source, float* target) {
  target[threadIdx.x] = __shfl_xor_sync(kFullWarp, source[threadIdx.x], 1);
}

}  // namespace

const char* launch_fault(const std::string& name, const float* source, float* target) {
  const auto run = [&](void (*kernel)(const float*, float*)) {
    return launch(kernel, dim3(1), kThreads, kThreads * 16, nullptr, source, target);
  };
  if (name == "none") return run(reverse<true>);
  if (name == "no_barrier") return run(reverse<false>);
  if (name == "waited_copy") return run(copy<true>);
  if (name == "no_wait") return run(copy<false>);
  if (name == "exchange") return run(exchange_neighbours);
  if (name == "past_the_end") return run(read_past_the_end);
  if (name == "divergent_warp") return run(divergent_warp);
  if (name == "barrier_for_some") return run(barrier_for_some);
  return "there is no such fault";
}

void convert(const float* source, int64_t count, uint16_t* half, uint16_t* bfloat16, float* from_half,
             float* from_bfloat16) {
  for (int64_t i = 0; i < count; ++i) {
    const __half h = from_float<__half>(source[i]);
    const __nv_bfloat16 b = from_float<__nv_bfloat16>(source[i]);
    half[i] = h.bits;
    bfloat16[i] = b.bits;
    from_half[i] = to_float(h);
    from_bfloat16[i] = to_float(b);
  }
}

}  // namespace haste::cuda
