// Does a product of 72 columns read the last 8 from the second panel, where B's rows are k (transposed B)? Hopper's
// gradients of attn_align_loss rest on it. Both kinds of A: in registers, and transposed in shared memory.
//
//   nvcc -std=c++17 -gencode=arch=compute_90a,code=sm_90a -Icsrc tools/gpu/wgmma_n72.cu -o n72 && ./n72
//
// Exit status: 0 right, 3 wrong, 4 an error of the device.
#include <kernels/cuda/arch_hopper.cuh>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

using namespace haste::cuda;
using Element = __nv_bfloat16;

constexpr int kRows = 64, kDepth = 64, kColumns = 72;
constexpr int kPanelBytes = kDepth * kPanelRowBytes;
constexpr int kSharedBytes = 3 * kPanelBytes;  // B takes two panels, transposed A one
constexpr uint32_t kTwoNaNs = 0x7fc07fc0u;     // what is in no matrix must not be read

template <bool kAInRegisters>
__global__ void __launch_bounds__(kWarpgroupSize, 1) product(const Element* a, const Element* b, float* out) {
  char* b_panels = static_cast<char*>(panel_memory());
  char* a_panel = b_panels + 2 * kPanelBytes;
  auto* words = reinterpret_cast<uint32_t*>(b_panels);
  for (int i = threadIdx.x; i < kSharedBytes / 4; i += kWarpgroupSize) words[i] = kTwoNaNs;
  __syncthreads();
  for (int i = threadIdx.x; i < kDepth * kColumns; i += kWarpgroupSize) {
    const int k = i / kColumns, n = i % kColumns;
    *reinterpret_cast<Element*>(b_panels + n / 64 * kPanelBytes + panel_offset(k, n % 64)) = b[i];
  }
  for (int i = threadIdx.x; i < kRows * kDepth; i += kWarpgroupSize) {
    *reinterpret_cast<Element*>(a_panel + panel_offset(i % kDepth, i / kDepth)) = a[i];
  }
  fence_shared_for_async();
  __syncthreads();

  const int lane = threadIdx.x % kWarpSize, row = threadIdx.x / kWarpSize * 16 + lane / 4;
  uint32_t fragments[kDepth / 16][4];
  for (int step = 0; step < kDepth / 16; ++step) {
    for (int i = 0; i < 4; ++i) {
      const int k = step * 16 + lane % 4 * 2 + i / 2 * 8;
      fragments[step][i] = *reinterpret_cast<const uint32_t*>(a + (row + i % 2 * 8) * kDepth + k);
    }
  }
  float c[kColumns / 8][4];
  fence_registers(c);
  fence_registers(fragments);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < kDepth / 16; ++step) {
    const int offset = step * 16 * kPanelRowBytes;
    const uint64_t columns = columns_descriptor(b_panels + offset, kPanelBytes);
    if constexpr (kAInRegisters) {
      wgmma<Element, kColumns, true>(c, fragments[step], columns, step > 0);
    } else {
      wgmma<Element, kColumns, true, true>(c, columns_descriptor(a_panel + offset, kPanelBytes), columns, step > 0);
    }
  }
  wgmma_commit();
  wgmma_wait<0>();
  fence_registers(c);
  for (int cell = 0; cell < kColumns / 8; ++cell) {
    for (int i = 0; i < 4; ++i) out[(row + i / 2 * 8) * kColumns + cell * 8 + lane % 4 * 2 + i % 2] = c[cell][i];
  }
}

template <typename T>
T* on_device(const std::vector<T>& values) {
  void* memory = nullptr;
  if (cudaMalloc(&memory, values.size() * sizeof(T)) != cudaSuccess) std::exit(4);
  if (cudaMemcpy(memory, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice) != cudaSuccess) std::exit(4);
  return static_cast<T*>(memory);
}

// The largest errors in columns 0 to 63 and 64 to 71; what is not a number is the largest.
bool check(const char* name, const std::vector<Element>& a, const std::vector<Element>& b,
           const std::vector<float>& c) {
  double worst[2] = {0, 0};
  for (int m = 0; m < kRows; ++m) {
    for (int n = 0; n < kColumns; ++n) {
      double exact = 0;
      for (int k = 0; k < kDepth; ++k) {
        exact += double(__bfloat162float(a[m * kDepth + k])) * double(__bfloat162float(b[k * kColumns + n]));
      }
      const double error = std::fabs(c[m * kColumns + n] - exact);
      double& largest = worst[n >= 64];
      if (!(error <= largest)) largest = std::isfinite(error) ? error : INFINITY;
    }
  }
  const bool right = worst[0] < 1e-4 && worst[1] < 1e-4;
  std::printf("A %s: %s, largest error in columns 0-63 %.2e, 64-71 %.2e\n", name, right ? "right" : "WRONG", worst[0],
              worst[1]);
  return right;
}

template <bool kAInRegisters>
bool run(const char* name, const std::vector<Element>& a, const std::vector<Element>& b) {
  std::vector<float> c(kRows * kColumns, NAN);
  float* out = on_device(c);
  cudaFuncSetAttribute(product<kAInRegisters>, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  product<kAInRegisters><<<1, kWarpgroupSize, kSharedBytes>>>(on_device(a), on_device(b), out);
  cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) error = cudaMemcpy(c.data(), out, c.size() * sizeof(float), cudaMemcpyDeviceToHost);
  if (error != cudaSuccess) {
    std::printf("A %s: %s\n", name, cudaGetErrorString(error));
    std::exit(4);
  }
  return check(name, a, b, c);
}

int main() {
  std::vector<Element> a(kRows * kDepth), b(kDepth * kColumns);
  for (auto* matrix : {&a, &b}) {
    for (Element& x : *matrix) x = __float2bfloat16(static_cast<float>(std::rand()) / RAND_MAX - 0.5f);
  }
  const bool registers = run<true>("in registers", a, b), shared = run<false>("in shared memory", a, b);
  return registers && shared ? 0 : 3;
}
