// How every kernel of this project is started.
#pragma once

#include <cuda_runtime.h>

#include <climits>
#include <cstdint>

namespace haste::cuda {

// Starts `kernel` on `stream` and returns nullptr, or the error in one sentence (static storage). It neither waits
// nor allocates, so it may be captured in a CUDA graph.
template <typename... Parameters>
const char* launch(void (*kernel)(Parameters...), dim3 grid, int threads, int64_t shared_bytes, void* stream,
                   const Parameters&... arguments) {
  constexpr int64_t kSharedWithoutAsking = 48 * 1024;
  if (shared_bytes > kSharedWithoutAsking) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return cudaGetErrorString(error);
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Whether a count fits the x dimension of a grid, and the int that a kernel counts with.
constexpr bool fits_int(int64_t count) { return count <= INT_MAX; }

// Whether 16-byte accesses may walk from `data` by this stride (in elements of `size` bytes).
inline bool aligned_16(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }
constexpr bool stride_aligned_16(int64_t extent, int64_t stride, int64_t size) {
  return extent <= 1 || stride * size % 16 == 0;
}

}  // namespace haste::cuda
