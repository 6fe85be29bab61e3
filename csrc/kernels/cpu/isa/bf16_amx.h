// Products of bf16 matrices on AMX tiles, summed in fp32. A tile is 16 rows of 64 bytes: 16 × 16 sums, 16 rows × 32
// numbers of the left operand, or 16 pairs of rows × 16 columns of the right one.
#pragma once

#include "bf16_matrix.h"

namespace haste::cpu::HASTE_ISA {
namespace {

constexpr int kTile = 16;     // rows of a tile, and columns of a tile of sums
constexpr int kRows = kTile;  // a product has whole kRows of rows, whole vectors of columns,
constexpr int kDepth = 32;    // and sums over whole kDepth

// The tile registers, all of full size, for as long as this lives.
class Engine {
 public:
  Engine() {
    struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {kTile, kTile, kTile, kTile, kTile, kTile, kTile, kTile};
    } config;
    static_assert(sizeof config == 64, "as the instruction wants it");
    asm volatile("" : : "r"(&config) : "memory");  // GCC 12's intrinsic says that it reads 8 bytes of it
    _tile_loadconfig(&config);
  }
  ~Engine() { _tile_release(); }
};

// `Rows` × `Columns` tiles of sums: sums (+)= left · right over `depth` numbers.
template <int Rows, int Columns, bool Accumulate>
HASTE_INLINE void multiply_tiles(Matrix<const uint16_t> left, Matrix<const uint32_t> right, int64_t depth,
                                 Matrix<float> sums) {
  static_assert(Rows <= 2 && Columns <= 2, "four tiles of sums");
  const int64_t sums_bytes = sums.stride * 4, left_bytes = left.stride * 2, right_bytes = right.stride * 4;
  if constexpr (Accumulate) {
    _tile_loadd(0, sums.at(0, 0), sums_bytes);
    if constexpr (Columns == 2) _tile_loadd(1, sums.at(0, kTile), sums_bytes);
    if constexpr (Rows == 2) _tile_loadd(2, sums.at(kTile, 0), sums_bytes);
    if constexpr (Rows == 2 && Columns == 2) _tile_loadd(3, sums.at(kTile, kTile), sums_bytes);
  } else {
    _tile_zero(0);
    if constexpr (Columns == 2) _tile_zero(1);
    if constexpr (Rows == 2) _tile_zero(2);
    if constexpr (Rows == 2 && Columns == 2) _tile_zero(3);
  }
  for (int64_t d = 0; d < depth; d += kDepth) {
    _tile_loadd(4, left.at(0, d), left_bytes);
    _tile_loadd(6, right.at(d / 2, 0), right_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (Columns == 2) {
      _tile_loadd(7, right.at(d / 2, kTile), right_bytes);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (Rows == 2) {
      _tile_loadd(5, left.at(kTile, d), left_bytes);
      _tile_dpbf16ps(2, 5, 6);
    }
    if constexpr (Rows == 2 && Columns == 2) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, sums.at(0, 0), sums_bytes);
  if constexpr (Columns == 2) _tile_stored(1, sums.at(0, kTile), sums_bytes);
  if constexpr (Rows == 2) _tile_stored(2, sums.at(kTile, 0), sums_bytes);
  if constexpr (Rows == 2 && Columns == 2) _tile_stored(3, sums.at(kTile, kTile), sums_bytes);
}

// sums[rows][columns] (+)= left[rows][depth] · right[depth][columns].
template <bool Accumulate>
void multiply(Matrix<const uint16_t> left, Matrix<const uint32_t> right, int64_t rows, int64_t columns, int64_t depth,
              Matrix<float> sums) {
  asm volatile("" ::: "memory");  // GCC 12's tile loads do not say that they read memory: no store moves behind them
  for (int64_t row = 0; row < rows; row += 2 * kTile) {
    const Matrix<const uint16_t> a{left.at(row, 0), left.stride};
    const bool two_rows = row + kTile < rows;
    for (int64_t column = 0; column < columns; column += 2 * kTile) {
      const Matrix<const uint32_t> b{right.at(0, column), right.stride};
      const Matrix<float> c{sums.at(row, column), sums.stride};
      const bool two_columns = column + kTile < columns;
      if (two_rows && two_columns) {
        multiply_tiles<2, 2, Accumulate>(a, b, depth, c);
      } else if (two_rows) {
        multiply_tiles<2, 1, Accumulate>(a, b, depth, c);
      } else if (two_columns) {
        multiply_tiles<1, 2, Accumulate>(a, b, depth, c);
      } else {
        multiply_tiles<1, 1, Accumulate>(a, b, depth, c);
      }
    }
  }
}

}  // namespace
}  // namespace haste::cpu::HASTE_ISA
