// Vectors of float and double as wide as the instruction set at hand, on the compiler's vector extensions,
// so that one source serves SSE2, AVX2, AVX-512 and NEON.
//
// This header is compiled once per instruction set into one binary. Nothing in it (nor in what includes it) may
// have external linkage: the linker keeps one copy of an inline function, and if it kept the AVX-512 one, the
// portable kernels would run it too. Hence the unnamed namespaces, and no standard library templates.
#pragma once

#include <cstdint>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#define HASTE_INLINE inline __attribute__((always_inline))

namespace haste::cpu::HASTE_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kVectorRegisters = 32;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kVectorRegisters = 16;
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16;
constexpr int kVectorRegisters = 32;
#else
constexpr int kVectorBytes = 16;
constexpr int kVectorRegisters = 16;
#endif

template <class T>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(kVectorBytes)));
  typedef int32_t bits __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(kVectorBytes)));
  typedef int64_t bits __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VectorOf<uint32_t> {
  typedef uint32_t type __attribute__((vector_size(kVectorBytes)));
  typedef int32_t bits __attribute__((vector_size(kVectorBytes)));
};

template <class T>
using Vector = typename VectorOf<T>::type;
template <class T>
using Bits = typename VectorOf<T>::bits;

typedef float HalfVector __attribute__((vector_size(kVectorBytes / 2)));

template <class T>
constexpr int kLanes = kVectorBytes / int(sizeof(T));

template <class T>
HASTE_INLINE Vector<T> load(const T* from) {
  Vector<T> v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}

template <class T>
HASTE_INLINE void store(T* to, Vector<T> v) {
  __builtin_memcpy(to, &v, sizeof v);
}

template <class T>
HASTE_INLINE Vector<T> broadcast(T x) {
  return x - Vector<T>{};  // x - 0 is x for every x, −0 and NaN included
}

// Of two numbers the larger (smaller); the second where either is NaN.
template <class T>
HASTE_INLINE Vector<T> max(Vector<T> a, Vector<T> b) {
  return a > b ? a : b;
}
template <class T>
HASTE_INLINE Vector<T> min(Vector<T> a, Vector<T> b) {
  return a < b ? a : b;
}

#if defined(__SSE2__)  // GCC 12 makes comparisons and blends of the above
#if defined(__AVX512F__)
#define HASTE_FLOATS(operation, a, b) Vector<float>(_mm512_##operation##_ps(__m512(a), __m512(b)))
#elif defined(__AVX2__)
#define HASTE_FLOATS(operation, a, b) Vector<float>(_mm256_##operation##_ps(__m256(a), __m256(b)))
#else
#define HASTE_FLOATS(operation, a, b) Vector<float>(_mm_##operation##_ps(__m128(a), __m128(b)))
#endif
template <>
HASTE_INLINE Vector<float> max<float>(Vector<float> a, Vector<float> b) {
  return HASTE_FLOATS(max, a, b);
}
template <>
HASTE_INLINE Vector<float> min<float>(Vector<float> a, Vector<float> b) {
  return HASTE_FLOATS(min, a, b);
}
#undef HASTE_FLOATS
#endif

template <class T>
HASTE_INLINE T sum(Vector<T> v) {
  T lanes[kLanes<T>];
  store(lanes, v);
  for (int half = kLanes<T> / 2; half > 0; half /= 2) {  // a tree: one addition waits for log2 others, not for all
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

// Half of the lanes, as double. (GCC 12 converts whole vectors in pieces of two or four.)
HASTE_INLINE Vector<double> lower_half(Vector<float> v) {
#if defined(__AVX512F__)
  return Vector<double>(_mm512_cvtps_pd(_mm512_castps512_ps256(__m512(v))));
#elif defined(__AVX2__)
  return Vector<double>(_mm256_cvtps_pd(_mm256_castps256_ps128(__m256(v))));
#elif defined(__SSE2__)
  return Vector<double>(_mm_cvtps_pd(__m128(v)));
#else
  HalfVector half;
  __builtin_memcpy(&half, &v, sizeof half);
  return __builtin_convertvector(half, Vector<double>);
#endif
}
HASTE_INLINE Vector<double> upper_half(Vector<float> v) {
#if defined(__AVX512DQ__)
  return Vector<double>(_mm512_cvtps_pd(_mm512_extractf32x8_ps(__m512(v), 1)));
#elif defined(__AVX2__)
  return Vector<double>(_mm256_cvtps_pd(_mm256_extractf128_ps(__m256(v), 1)));
#elif defined(__SSE2__)
  return Vector<double>(_mm_cvtps_pd(_mm_movehl_ps(__m128(v), __m128(v))));
#else
  HalfVector half;
  __builtin_memcpy(&half, reinterpret_cast<const char*>(&v) + sizeof half, sizeof half);
  return __builtin_convertvector(half, Vector<double>);
#endif
}

// The lower, or the upper, halves of two vectors with their lanes alternating: a0 b0 a1 b1 ...
template <int Lanes, bool Upper, class V>
HASTE_INLINE V interleave(V a, V b) {
  constexpr int h = Upper ? Lanes / 2 : 0;
  if constexpr (Lanes == 2) {
    return __builtin_shufflevector(a, b, h, h + 2);
  } else if constexpr (Lanes == 4) {
    return __builtin_shufflevector(a, b, h, h + 4, h + 1, h + 5);
  } else if constexpr (Lanes == 8) {
    return __builtin_shufflevector(a, b, h, h + 8, h + 1, h + 9, h + 2, h + 10, h + 3, h + 11);
  } else {
    return __builtin_shufflevector(a, b, h, h + 16, h + 1, h + 17, h + 2, h + 18, h + 3, h + 19, h + 4, h + 20, h + 5,
                                   h + 21, h + 6, h + 22, h + 7, h + 23);
  }
}

// Transposes a square of kLanes × kLanes elements. Interleaving row r with row r + kLanes/2 rotates the bits of
// (row, column) by one; after log2(kLanes) rounds rows and columns have changed places.
template <class T>
HASTE_INLINE void transpose_square(const T* from, int64_t from_stride, T* to, int64_t to_stride) {
  constexpr int L = kLanes<T>;
  Vector<T> a[L], b[L];
#pragma GCC unroll 16
  for (int r = 0; r < L; ++r) a[r] = load(from + r * from_stride);
#pragma GCC unroll 4
  for (int round = 1; round < L; round *= 2) {
#pragma GCC unroll 8
    for (int r = 0; r < L / 2; ++r) {
      b[2 * r] = interleave<L, false>(a[r], a[r + L / 2]);
      b[2 * r + 1] = interleave<L, true>(a[r], a[r + L / 2]);
    }
#pragma GCC unroll 16
    for (int r = 0; r < L; ++r) a[r] = b[r];
  }
#pragma GCC unroll 16
  for (int r = 0; r < L; ++r) store(to + r * to_stride, a[r]);
}

// rows × columns to columns × rows; both are multiples of kLanes.
template <class T>
void transpose(const T* from, int64_t from_stride, int64_t rows, int64_t columns, T* to, int64_t to_stride) {
  for (int64_t r = 0; r < rows; r += kLanes<T>) {
    for (int64_t c = 0; c < columns; c += kLanes<T>) {
      transpose_square(from + r * from_stride + c, from_stride, to + c * to_stride + r, to_stride);
    }
  }
}

HASTE_INLINE constexpr int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}
HASTE_INLINE constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

}  // namespace
}  // namespace haste::cpu::HASTE_ISA
