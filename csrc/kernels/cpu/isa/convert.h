// Element types to and from the type that is computed in: float, or double for Float64.
// A conversion to fp16 or bf16 rounds to nearest even, keeps NaN, and goes to infinity past the largest number.
#pragma once

#include "kernels/kernel_types.h"
#include "vector_ops.h"

namespace haste::cpu::HASTE_ISA {
namespace {

struct Half {
  uint16_t bits;
};
struct Bfloat {
  uint16_t bits;
};

typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));  // one per lane of Vector<float>
typedef int32_t Integers __attribute__((vector_size(kVectorBytes)));
typedef uint16_t Halfwords __attribute__((vector_size(kVectorBytes / 2)));

// 16-bit numbers to the upper halves of 32-bit words. (GCC 12 would convert whole vectors in pieces.)
HASTE_INLINE Words load_halfwords(const void* from) {
#if defined(__AVX512F__)
  return Words(_mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(from)))) << 16;
#elif defined(__AVX2__)
  return Words(_mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(from)))) << 16;
#elif defined(__SSE2__)
  return Words(_mm_unpacklo_epi16(_mm_setzero_si128(), _mm_loadl_epi64(static_cast<const __m128i*>(from))));
#else
  Halfwords narrow;
  __builtin_memcpy(&narrow, from, sizeof narrow);
  return __builtin_convertvector(narrow, Words) << 16;
#endif
}

// The low halves of 32-bit words to 16-bit numbers.
HASTE_INLINE void store_halfwords(void* to, Words wide) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(static_cast<__m256i*>(to), _mm512_cvtepi32_epi16(__m512i(wide)));
#elif defined(__AVX2__)
  const __m256i halves = _mm256_packus_epi32(__m256i(wide), __m256i(wide));
  _mm_storeu_si128(static_cast<__m128i*>(to), _mm256_castsi256_si128(_mm256_permute4x64_epi64(halves, 0x08)));
#elif defined(__SSE2__)
  const __m128i extended = _mm_srai_epi32(_mm_slli_epi32(__m128i(wide), 16), 16);  // which packing leaves as they are
  _mm_storel_epi64(static_cast<__m128i*>(to), _mm_packs_epi32(extended, extended));
#else
  const Halfwords narrow = __builtin_convertvector(wide, Halfwords);
  __builtin_memcpy(to, &narrow, sizeof narrow);
#endif
}

HASTE_INLINE Vector<float> widen(const float* from) { return load(from); }

HASTE_INLINE Vector<float> widen(const double* from) {
  Vector<float> v;
  for (int i = 0; i < kLanes<float>; ++i) v[i] = float(from[i]);
  return v;
}

HASTE_INLINE Vector<float> widen(const Bfloat* from) { return Vector<float>(load_halfwords(from)); }

HASTE_INLINE Vector<float> widen(const Half* from) {
#if defined(__AVX512F__)
  return Vector<float>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
#elif defined(__AVX2__) && defined(__F16C__)
  return Vector<float>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#else
  // Sign, exponent and mantissa moved to their places, then the difference of the biases as a factor: subnormal
  // numbers become normal by themselves. What was infinite or NaN comes out at 2^16 or more.
  const Words moved = Words(Integers(load_halfwords(from)) >> 3) & 0x8fffe000;
  const Words scaled = Words(Vector<float>(moved) * 0x1p112f);
  const Words special = Words(Vector<float>(scaled & 0x7fffffff) >= 0x1p16f);
  return Vector<float>(scaled | (special & 0x7f800000));
#endif
}

HASTE_INLINE void narrow(float* to, Vector<float> v) { store(to, v); }

HASTE_INLINE void narrow(Bfloat* to, Vector<float> v) {
  const Words bits = Words(v);
  const Words rounded = bits + 0x7fff + ((bits >> 16) & 1);
  store_halfwords(to, Words(v == v ? Vector<float>(rounded) : Vector<float>(bits | 0x400000)) >> 16);
}

HASTE_INLINE void narrow(Half* to, Vector<float> v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(__m512(v), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__) && defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(__m256(v), _MM_FROUND_TO_NEAREST_INT));
#else
  // 2^13 times the number's power of two (of the smallest normal number's, below it) has its last place where fp16 has
  // its own: the addition rounds. From 65520 on the nearest is infinity, which 2^16 turns into by itself.
  const Vector<float> magnitude = min<float>(broadcast(0x1p16f), Vector<float>(Words(v) & 0x7fffffff));
  const Words power = Words(max<float>(broadcast(0x1p-14f), Vector<float>(Words(magnitude) & 0x7f800000)));
  const Words aligned = power + (13u << 23);
  const Words mantissa = Words(magnitude + Vector<float>(aligned)) - aligned;  // the leading 1 included
  const Words nan = Words(v != v) & 0x7e00;
  store_halfwords(to, (mantissa + ((power - (113u << 23)) >> 13)) | nan | ((Words(v) >> 16) & 0x8000));
#endif
}

HASTE_INLINE void narrow(double* to, Vector<float> v) {
  for (int i = 0; i < kLanes<float>; ++i) to[i] = v[i];
}

// Double is computed in only where Float64 asks for it: speed is not the aim here, so it goes through float.
HASTE_INLINE Vector<double> widen_to_double(const double* from) { return load(from); }
template <class Element>
HASTE_INLINE Vector<double> widen_to_double(const Element* from) {
  Element padded[kLanes<float>] = {};
  __builtin_memcpy(padded, from, kLanes<double> * sizeof(Element));
  const Vector<float> floats = widen(padded);
  Vector<double> v;
  for (int i = 0; i < kLanes<double>; ++i) v[i] = floats[i];
  return v;
}

HASTE_INLINE void narrow(double* to, Vector<double> v) { store(to, v); }
template <class Element>
HASTE_INLINE void narrow(Element* to, Vector<double> v) {
  Vector<float> floats{};
  for (int i = 0; i < kLanes<double>; ++i) floats[i] = float(v[i]);
  Element padded[kLanes<float>];
  narrow(padded, floats);
  __builtin_memcpy(to, padded, kLanes<double> * sizeof(Element));
}

// kLanes elements as numbers of type T ...
template <class T, class Element>
HASTE_INLINE Vector<T> load_as(const Element* from) {
  if constexpr (sizeof(T) == sizeof(double)) {
    return widen_to_double(from);
  } else {
    return widen(from);
  }
}

// ... or the first `count` of them, 0 in the other lanes; nothing past `count` is touched.
template <class T, class Element>
HASTE_INLINE Vector<T> load_first(const Element* from, int64_t count) {
  Element padded[kLanes<T>] = {};
  __builtin_memcpy(padded, from, count * sizeof(Element));
  return load_as<T>(padded);
}

template <class T, class Element>
HASTE_INLINE void store_first(Element* to, Vector<T> v, int64_t count) {
  Element padded[kLanes<T>];
  narrow(padded, v);
  __builtin_memcpy(to, padded, count * sizeof(Element));
}

// Calls use(data as a pointer to the C++ type of `type`): a template chosen by a value.
template <class Use>
HASTE_INLINE void with_elements(const void* data, ScalarType type, const Use& use) {
  switch (type) {
    case ScalarType::Float32: return use(static_cast<const float*>(data));
    case ScalarType::Float64: return use(static_cast<const double*>(data));
    case ScalarType::Float16: return use(static_cast<const Half*>(data));
    case ScalarType::BFloat16: return use(static_cast<const Bfloat*>(data));
  }
}
template <class Use>
HASTE_INLINE void with_elements(void* data, ScalarType type, const Use& use) {
  switch (type) {
    case ScalarType::Float32: return use(static_cast<float*>(data));
    case ScalarType::Float64: return use(static_cast<double*>(data));
    case ScalarType::Float16: return use(static_cast<Half*>(data));
    case ScalarType::BFloat16: return use(static_cast<Bfloat*>(data));
  }
}

}  // namespace
}  // namespace haste::cpu::HASTE_ISA
