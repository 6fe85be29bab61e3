// Eight neighbouring elements per thread: how the pointwise kernels read and write rows of any type and alignment.
#pragma once

#include "arch.cuh"
#include "launch.cuh"

namespace haste::cuda {

constexpr int kVector = 8;

template <typename T>
struct alignas(16) Vector {
  T elements[kVector];
};

// Elements [0, count) of `source`, zeros behind them, in fp32. `aligned`: 16-byte aligned and whole (count ≥ 8).
template <typename T>
__device__ void load(float (&values)[kVector], const T* source, int count, bool aligned) {
  if (aligned) {
    uint4 words[sizeof(T) / 2];
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(T) / 2); ++i) words[i] = reinterpret_cast<const uint4*>(source)[i];
    const auto& vector = reinterpret_cast<const Vector<T>&>(words);
#pragma unroll
    for (int i = 0; i < kVector; ++i) values[i] = to_float(vector.elements[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kVector; ++i) values[i] = i < count ? to_float(source[i]) : 0.f;
  }
}

// Rounds the first `count` values to T and writes them.
template <typename T>
__device__ void store(T* target, const float (&values)[kVector], int count, bool aligned) {
  if (aligned) {
    uint4 words[sizeof(T) / 2];
    auto& vector = reinterpret_cast<Vector<T>&>(words);
#pragma unroll
    for (int i = 0; i < kVector; ++i) vector.elements[i] = from_float<T>(values[i]);
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(T) / 2); ++i) reinterpret_cast<uint4*>(target)[i] = words[i];
  } else {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (i < count) target[i] = from_float<T>(values[i]);
    }
  }
}

}  // namespace haste::cuda
