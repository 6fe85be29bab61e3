// The processor, in one thin layer: every line of PTX of this project is in this file. The kernels above it are plain
// C++, and so the test suite can compile them for the host, where an emulation takes the place of these functions.
//
// Fragments of a warp-wide product, per lane (PTX ISA, "Matrix Fragments for mma.m16n8k16"):
//   accumulator, 16 × 8: c[0], c[1] = row lane/4, columns 2·(lane%4) + {0, 1}; c[2], c[3] = row lane/4 + 8
//   A, 16 × 16: a[0], a[1] = rows lane/4, lane/4 + 8 of columns 0–7; a[2], a[3] the same of columns 8–15
//   B, 16 × 8: b[0], b[1] = rows 0–7, 8–15 of column lane/4
// where an A or B register holds two neighbours along the contraction.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

namespace haste::cuda {

constexpr int kWarpSize = 32;
constexpr unsigned kFullWarp = 0xffffffffu;

#ifdef HASTE_EMULATED

void* dynamic_shared_memory();
void copy_async_16(void* shared, const void* global, bool valid);
void copy_async_8(void* shared, const void* global, bool valid);
void copy_async_4(void* shared, const void* global, bool valid);
void wait_for_copies();
void load_matrices(uint32_t (&registers)[4], const void* row);
void load_matrices(uint32_t (&registers)[2], const void* row);
void load_matrices_transposed(uint32_t (&registers)[4], const void* row);
void load_matrices_transposed(uint32_t (&registers)[2], const void* row);
template <typename T>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <typename T>
void multiply_add(float (&c)[4], const uint32_t (&a)[2], uint32_t b);
float fast_exp2(float x);
float clamp(float x, float limit);
void load_16(uint4& words, const void* source, bool wanted);
void load_16_once(uint4& words, const void* source, bool wanted);
template <int kCount>
void add_if_weighted(float (&sum)[kCount], const float (&values)[kCount], float weight) {
  for (int i = 0; weight != 0.f && i < kCount; ++i) sum[i] = fmaf(weight, values[i], sum[i]);
}

#else

__device__ inline void* dynamic_shared_memory() {
  extern __shared__ uint4 haste_dynamic_shared[];
  return haste_dynamic_shared;
}

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Starts a copy of 16 (8, 4) bytes, both addresses aligned to as many; writes zeros, and reads nothing, where not valid.
__device__ inline void copy_async_16(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
}

__device__ inline void copy_async_8(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;\n" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid ? 8 : 0)
               : "memory");
}

__device__ inline void copy_async_4(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;\n" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid ? 4 : 0)
               : "memory");
}

// Waits for the copies that this thread has started; a barrier must follow before another thread reads them.
__device__ inline void wait_for_copies() { asm volatile("cp.async.wait_all;\n" ::: "memory"); }

// Loads 8 × 8 matrices of 16-bit elements; lane 8·i + r gives the 16-byte-aligned address of row r of matrix i.
__device__ inline void load_matrices(uint32_t (&registers)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(shared_address(row))
               : "memory");
}

__device__ inline void load_matrices(uint32_t (&registers)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];\n"
               : "=r"(registers[0]), "=r"(registers[1])
               : "r"(shared_address(row))
               : "memory");
}

__device__ inline void load_matrices_transposed(uint32_t (&registers)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(shared_address(row))
               : "memory");
}

__device__ inline void load_matrices_transposed(uint32_t (&registers)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];\n"
               : "=r"(registers[0]), "=r"(registers[1])
               : "r"(shared_address(row))
               : "memory");
}

// c += a·b over a contraction of 16, elements of type T, fp32 accumulation.
template <typename T>
__device__ inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, __half>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    static_assert(std::is_same_v<T, __nv_bfloat16>);
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// The same over a contraction of 8.
template <typename T>
__device__ inline void multiply_add(float (&c)[4], const uint32_t (&a)[2], uint32_t b) {
  if constexpr (std::is_same_v<T, __half>) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(b));
  } else {
    static_assert(std::is_same_v<T, __nv_bfloat16>);
    asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(b));
  }
}

// 2^x within 2 ulp; results below 2^-126 are flushed to 0.
__device__ inline float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// x held to ± limit; NaN stays NaN, which fminf and fmaxf would swallow.
__device__ inline float clamp(float x, float limit) {
  float y;
  asm("{\n.reg .f32 low;\nmax.NaN.f32 low, %1, %2;\nmin.NaN.f32 %0, low, %3;\n}"
      : "=f"(y)
      : "f"(x), "f"(-limit), "f"(limit));
  return y;
}

// Loads 16 bytes that nobody writes during the launch; where they are not wanted nothing is read and `words` stays.
// These loads keep the order in which they are written, so that many can be under way before the first is waited for.
__device__ inline void load_16(uint4& words, const void* source, bool wanted) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %5, 0;\n@p ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];\n}"
               : "+r"(words.x), "+r"(words.y), "+r"(words.z), "+r"(words.w)
               : "l"(source), "r"(static_cast<int>(wanted)));
}

// The same of what nobody will read again: it takes no room in the first-level cache.
__device__ inline void load_16_once(uint4& words, const void* source, bool wanted) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %5, 0;\n@p ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];\n}"
      : "+r"(words.x), "+r"(words.y), "+r"(words.z), "+r"(words.w)
      : "l"(source), "r"(static_cast<int>(wanted)));
}

// sum += weight · values, unless the weight is 0: then not even a NaN comes in. Without a branch, which the compiler
// would make of it.
__device__ inline void add_if_weighted(float (&sum)[4], const float (&values)[4], float weight) {
  asm("{\n.reg .pred p;\nsetp.neu.f32 p, %8, 0f00000000;\n"
      "@p fma.rn.f32 %0, %8, %4, %0;\n@p fma.rn.f32 %1, %8, %5, %1;\n"
      "@p fma.rn.f32 %2, %8, %6, %2;\n@p fma.rn.f32 %3, %8, %7, %3;\n}"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "f"(values[0]), "f"(values[1]), "f"(values[2]), "f"(values[3]), "f"(weight));
}

__device__ inline void add_if_weighted(float (&sum)[8], const float (&values)[8], float weight) {
  asm("{\n.reg .pred p;\nsetp.neu.f32 p, %16, 0f00000000;\n"
      "@p fma.rn.f32 %0, %16, %8, %0;\n@p fma.rn.f32 %1, %16, %9, %1;\n"
      "@p fma.rn.f32 %2, %16, %10, %2;\n@p fma.rn.f32 %3, %16, %11, %3;\n"
      "@p fma.rn.f32 %4, %16, %12, %4;\n@p fma.rn.f32 %5, %16, %13, %5;\n"
      "@p fma.rn.f32 %6, %16, %14, %6;\n@p fma.rn.f32 %7, %16, %15, %7;\n}"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3]), "+f"(sum[4]), "+f"(sum[5]), "+f"(sum[6]), "+f"(sum[7])
      : "f"(values[0]), "f"(values[1]), "f"(values[2]), "f"(values[3]), "f"(values[4]), "f"(values[5]), "f"(values[6]),
        "f"(values[7]), "f"(weight));
}

#endif  // HASTE_EMULATED

// Conversions by name of the element type, so that a template need not know which it has.
__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__device__ inline __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// Two neighbours of an A fragment, each rounded to nearest.
template <typename T>
__device__ uint32_t pack(float low, float high);
template <>
__device__ inline uint32_t pack<__half>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}
template <>
__device__ inline uint32_t pack<__nv_bfloat16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

// Reductions over the 4 lanes that share a row of an accumulator (group 4) or over the whole warp (group 32).
template <int kGroup>
__device__ float reduce_max(float x) {
  for (int other = kGroup / 2; other > 0; other /= 2) x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, other));
  return x;
}
template <int kGroup>
__device__ float reduce_sum(float x) {
  for (int other = kGroup / 2; other > 0; other /= 2) x += __shfl_xor_sync(kFullWarp, x, other);
  return x;
}

}  // namespace haste::cuda
