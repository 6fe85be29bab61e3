// Stands in for CUDA's header of this name: IEEE half precision, rounded to nearest, ties to even.
#pragma once

#include "cuda_runtime.h"

struct __half {
  uint16_t bits = 0;
};
struct __half2 {
  __half x, y;
};

inline float __half2float(__half h) {
  const float sign = h.bits & 0x8000 ? -1.f : 1.f;
  const int exponent = h.bits >> 10 & 31, mantissa = h.bits & 1023;
  if (exponent == 31) return mantissa ? __uint_as_float(0x7fc00000u) : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(static_cast<float>(mantissa), -24);
  return sign * std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25);
}

inline __half __float2half_rn(float x) {
  const uint16_t sign = __float_as_uint(x) >> 16 & 0x8000;
  const float size = std::fabs(x);
  if (std::isnan(x)) return {static_cast<uint16_t>(sign | 0x7e00)};
  if (size == 0.f) return {sign};
  if (size >= 65520.f) return {static_cast<uint16_t>(sign | 0x7c00)};  // halfway beyond the largest half, and up
  int exponent = 0;
  std::frexp(size, &exponent);                       // size < 2^exponent
  const int spacing = std::max(exponent - 11, -24);  // of halves of this size, as a power of 2
  const auto steps = static_cast<unsigned>(std::nearbyint(std::ldexp(size, -spacing)));
  // A carry out of the mantissa moves into the exponent by itself.
  return {static_cast<uint16_t>(sign | ((spacing + 24) * 1024u + steps))};
}

inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
