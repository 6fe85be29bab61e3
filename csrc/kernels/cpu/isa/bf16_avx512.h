// Products of bf16 matrices by vdpbf16ps, summed in fp32: a pair of numbers of the left operand in all lanes times a
// vector of pairs of the right one. Subnormal numbers count as zero, as they do on AMX.
#pragma once

#include "bf16_matrix.h"

namespace haste::cpu::HASTE_ISA {
namespace {

constexpr int kRows = 4;   // a product has whole kRows of rows, whole vectors of columns,
constexpr int kDepth = 2;  // and sums over whole kDepth
constexpr int kPanelVectors = 6;

struct Engine {
  Engine() {}  // nothing to set up
};

// kRows × Vectors vectors of sums in registers.
template <int Vectors, bool Accumulate>
HASTE_INLINE void multiply_rows(Matrix<const uint16_t> left, Matrix<const uint32_t> right, int64_t depth,
                                Matrix<float> sums) {
  constexpr int L = kLanes<float>;
  __m512 sum[kRows][Vectors];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) sum[r][v] = Accumulate ? _mm512_loadu_ps(sums.at(r, v * L)) : _mm512_setzero_ps();
  }
  for (int64_t pair = 0; pair < depth / 2; ++pair) {
    __m512bh row[Vectors];
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) row[v] = __m512bh(_mm512_loadu_si512(right.at(pair, v * L)));
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      int both;
      __builtin_memcpy(&both, left.at(r, 2 * pair), sizeof both);
      const __m512bh scalars = __m512bh(_mm512_set1_epi32(both));
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) sum[r][v] = _mm512_dpbf16_ps(sum[r][v], scalars, row[v]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) _mm512_storeu_ps(sums.at(r, v * L), sum[r][v]);
  }
}

// The panel that is `vectors` wide: a template chosen by a number.
template <bool Accumulate, int Widest = kPanelVectors>
void multiply_panel(int64_t vectors, Matrix<const uint16_t> left, Matrix<const uint32_t> right, int64_t rows,
                    int64_t depth, Matrix<float> sums) {
  if constexpr (Widest > 1) {
    if (vectors < Widest) return multiply_panel<Accumulate, Widest - 1>(vectors, left, right, rows, depth, sums);
  }
  for (int64_t row = 0; row < rows; row += kRows) {
    multiply_rows<Widest, Accumulate>({left.at(row, 0), left.stride}, right, depth, {sums.at(row, 0), sums.stride});
  }
}

// sums[rows][columns] (+)= left[rows][depth] · right[depth][columns].
template <bool Accumulate>
void multiply(Matrix<const uint16_t> left, Matrix<const uint32_t> right, int64_t rows, int64_t columns, int64_t depth,
              Matrix<float> sums) {
  const int64_t vectors = columns / kLanes<float>, panels = (vectors + kPanelVectors - 1) / kPanelVectors;
  for (int64_t panel = 0; panel < panels; ++panel) {
    const int64_t first = vectors * panel / panels, end = vectors * (panel + 1) / panels;
    const int64_t column = first * kLanes<float>;
    multiply_panel<Accumulate>(end - first, left, {right.at(0, column), right.stride}, rows, depth,
                               {sums.at(0, column), sums.stride});
  }
}

}  // namespace
}  // namespace haste::cpu::HASTE_ISA
