// A few neighbouring elements per thread, mostly eight: how the pointwise kernels read and write rows of any type and
// alignment.
#pragma once

#include "arch.cuh"
#include "launch.cuh"

namespace haste::cuda {

constexpr int kVector = 8;

template <typename T, int kCount = kVector>
struct alignas(kCount * sizeof(T) < 16 ? kCount * sizeof(T) : 16) Vector {
  T elements[kCount];
};

// How `kCount` elements cross the bus: 16 bytes at a time, or all 8 that there are.
template <typename T, int kCount>
struct Words {
  using Word = std::conditional_t<kCount * sizeof(T) % 16 == 0, uint4, uint2>;
  static constexpr int kWords = static_cast<int>(kCount * sizeof(T) / sizeof(Word));
  Word words[kWords];

  __device__ Vector<T, kCount>& vector() { return reinterpret_cast<Vector<T, kCount>&>(words); }
  __device__ const Vector<T, kCount>& vector() const { return reinterpret_cast<const Vector<T, kCount>&>(words); }
};

// Elements [0, count) of `source`, zeros behind them, in fp32. `aligned`: 16-byte aligned and whole (count ≥ kCount).
template <typename T, int kCount>
__device__ void load(float (&values)[kCount], const T* source, int count, bool aligned) {
  if (aligned) {
    using Row = Words<T, kCount>;
    Row row;
#pragma unroll
    for (int i = 0; i < Row::kWords; ++i) row.words[i] = reinterpret_cast<const typename Row::Word*>(source)[i];
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = to_float(row.vector().elements[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = i < count ? to_float(source[i]) : 0.f;
  }
}

// Rounds the first `count` values to T and writes them.
template <typename T, int kCount>
__device__ void store(T* target, const float (&values)[kCount], int count, bool aligned) {
  if (aligned) {
    using Row = Words<T, kCount>;
    Row row;
#pragma unroll
    for (int i = 0; i < kCount; ++i) row.vector().elements[i] = from_float<T>(values[i]);
#pragma unroll
    for (int i = 0; i < Row::kWords; ++i) reinterpret_cast<typename Row::Word*>(target)[i] = row.words[i];
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (i < count) target[i] = from_float<T>(values[i]);
    }
  }
}

}  // namespace haste::cuda
