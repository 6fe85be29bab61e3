// exp and log of vectors, to about one unit in the last place.
#pragma once

#include "vector_ops.h"

namespace haste::cpu::HASTE_ISA {
namespace {

template <class T>
struct ExpConstants;

template <>
struct ExpConstants<float> {
  // e^f on |f| ≤ ln2/2, least maximum relative error (3e-9) with 1 + f exact; coefficients of f^6 down to f^2.
  static constexpr float polynomial[] = {0.00138145986f, 0.00836871691f, 0.0416683880f, 0.166665206f, 0.499999934f};
  static constexpr float ln2_high = 0x1.62e4p-1f, ln2_low = 0x1.7f7d1cp-20f;  // n · ln2_high is exact
  static constexpr float round = 0x1.8p23f;  // adding it leaves an integer in the lowest bits
  static constexpr float lowest = -87.0f;    // below it e^x is taken for 0: it would be subnormal
  static constexpr int mantissa = 23, bias = 127;
};

template <>
struct ExpConstants<double> {
  // 1/k! for k = 13 down to 2: the next term is below 5e-18.
  static constexpr double polynomial[] = {1.0 / 6227020800, 1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800,
                                          1.0 / 362880,     1.0 / 40320,     1.0 / 5040,     1.0 / 720,
                                          1.0 / 120,        1.0 / 24,        1.0 / 6,        1.0 / 2};
  static constexpr double ln2_high = 0x1.62e42feep-1, ln2_low = 0x1.a39ef35793c76p-33;
  static constexpr double round = 0x1.8p52;
  static constexpr double lowest = -708.0;
  static constexpr int mantissa = 52, bias = 1023;
};

// e^x for x up to 88 (float) or 709 (double). e^x = 2^n · e^f with n the integer nearest to x / ln2; 2^n goes straight
// into the exponent bits. NaN stays NaN.
template <class T>
HASTE_INLINE Vector<T> exp(Vector<T> x) {
  using C = ExpConstants<T>;
  const Vector<T> clamped = max<T>(broadcast(C::lowest), x);
  const Vector<T> shifted = clamped * T(1.4426950408889634) + C::round;
  const Vector<T> n = shifted - C::round;
  const Vector<T> f = (clamped - n * C::ln2_high) - n * C::ln2_low;
  Vector<T> p = broadcast(C::polynomial[0]);
  for (unsigned i = 1; i < sizeof C::polynomial / sizeof(T); ++i) p = p * f + C::polynomial[i];
  p = T(1) + (p * (f * f) + f);  // the sum with 1 last: half a unit is its rounding, the rest counts little
  const Bits<T> scaled = Bits<T>(p) + (Bits<T>(shifted) << C::mantissa);
  return x < C::lowest ? Vector<T>{} : Vector<T>(scaled);
}

// log x for normal x > 0; NaN stays NaN. x = 2^n · (1 + f) with 1 + f around 1; log(1 + f) = f − f²/2 + s · (f²/2 + R),
// s = f / (2 + f) and R what the series of 2 artanh s has past its first term. f is exact, and 0 at x = 1: a map of one
// key has loss 0.
template <class T>
HASTE_INLINE Vector<T> log(Vector<T> x) {
  using C = ExpConstants<T>;
  constexpr int terms = sizeof(T) == sizeof(float) ? 4 : 11;  // s is below 0.172: 6e-10, 1e-19 are left out
  const Bits<T> root_half = Bits<T>(broadcast(T(0.70710678118654752)));
  const Bits<T> n = (Bits<T>(x) - root_half) >> C::mantissa;
  const Vector<T> f = Vector<T>(Bits<T>(x) - (n << C::mantissa)) - T(1);
  const Vector<T> s = f / (f + T(2)), square = s * s, half = T(0.5) * f * f;
  Vector<T> r = broadcast(T(2) / (2 * terms + 1));
  for (int k = terms - 1; k >= 1; --k) r = r * square + T(2) / (2 * k + 1);
  const Vector<T> exponent = __builtin_convertvector(n, Vector<T>);
  const Vector<T> correction = half - (s * (half + r * square) + exponent * C::ln2_low);
  const Vector<T> result = exponent * C::ln2_high - (correction - f);
  return x != x ? x : result;
}

}  // namespace
}  // namespace haste::cpu::HASTE_ISA
