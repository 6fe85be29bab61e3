// Matrices of bf16 as both engines for their products take them (bf16_amx.h, bf16_avx512.h). The left operand lies row
// by row. The right one lies in pairs of rows, [row / 2][column]: the two numbers that a column has in a pair of rows
// share a 32-bit word, as do the two of the left operand's row that they are multiplied with.
#pragma once

#include <immintrin.h>

#include "vector_ops.h"

namespace haste::cpu::HASTE_ISA {
namespace {

constexpr int kWord = 32;  // bf16 numbers of a vector register

// The stride in elements.
template <class T>
struct Matrix {
  T* data;
  int64_t stride;

  T* at(int64_t row, int64_t column) const { return data + row * stride + column; }
};

// Rows 2p and 2p+1, kWord numbers of each, as the words of a right operand.
HASTE_INLINE void store_pairs(__m512i even, __m512i odd, uint32_t* to) {
  const __m512i lower = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                         5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i upper = _mm512_add_epi16(lower, _mm512_set1_epi16(16));
  _mm512_storeu_si512(to, _mm512_permutex2var_epi16(even, lower, odd));
  _mm512_storeu_si512(to + 16, _mm512_permutex2var_epi16(even, upper, odd));
}

}  // namespace
}  // namespace haste::cpu::HASTE_ISA
