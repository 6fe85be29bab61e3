// What the emulated primitives of a warp have in common.
#pragma once

#include <kernels/cuda/arch.cuh>

#include "emulator.h"

namespace emulation {

template <typename Argument>
void meet_warp(Argument& argument, void (*perform)(void* const*)) {
  meet_warp(perform, &argument);
}

template <typename Argument>
Argument& at(void* const* arguments, int lane) {
  return *static_cast<Argument*>(arguments[lane]);
}

template <typename T>
float element(uint16_t bits) {
  return haste::cuda::to_float(reinterpret_cast<const T&>(bits));
}

// Element 0 or 1 of a register that holds two.
template <typename T>
float element_of(uint32_t word, int index) {
  return element<T>(static_cast<uint16_t>(word >> 16 * index));
}

// Tensor cores add exactly and cut the sum off towards zero.
inline float truncated(double x) {
  const float rounded = static_cast<float>(x);
  return std::fabs(static_cast<double>(rounded)) > std::fabs(x) ? std::nextafter(rounded, 0.f) : rounded;
}

}  // namespace emulation
