// AMX's tile registers in software, and vcvtne2ps2bf16, so that the kernels written for them run on any processor with
// AVX-512. Included ahead of a source, it takes the place of the intrinsics. Instructions do what Intel's manual says
// (Software Developer's Manual, volume 2), order of summation, rounding and flushing of subnormal numbers included, and
// stop the process where the processor would raise a fault.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

namespace emulated_amx {

inline void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "AMX fault: %s\n", what);
  std::abort();
}

struct Configuration {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[8], reserved_row_bytes[8];
  uint8_t rows[8], reserved_rows[8];
};
static_assert(sizeof(Configuration) == 64, "the operand of ldtilecfg");

struct Tile {
  char row[16][64];
};

inline thread_local Configuration configuration{};  // all zero: released
inline thread_local Tile tiles[8];

// Subnormal operands and results count as zero, rounding is to nearest even, whatever the thread has chosen.
class TileArithmetic {
 public:
  TileArithmetic() : before_(_mm_getcsr()) { _mm_setcsr(0x9fc0); }
  ~TileArithmetic() { _mm_setcsr(before_); }

 private:
  unsigned before_;
};

inline void load_configuration(const void* from) {
  Configuration c;
  std::memcpy(&c, from, sizeof c);
  require(c.palette == 1 && c.start_row == 0, "ldtilecfg: palette 1 from row 0 on is all that is emulated");
  for (int i = 0; i < 14; ++i) require(c.reserved[i] == 0, "ldtilecfg: a reserved byte is not 0");
  for (int t = 0; t < 8; ++t) {
    require(c.row_bytes[t] <= 64 && c.rows[t] <= 16, "ldtilecfg: a tile exceeds 16 rows of 64 bytes");
    require((c.row_bytes[t] == 0) == (c.rows[t] == 0),
            "ldtilecfg: a tile has rows without bytes or bytes without rows");
    require(c.reserved_row_bytes[t] == 0 && c.reserved_rows[t] == 0, "ldtilecfg: a tile beyond the eighth");
  }
  configuration = c;
  std::memset(tiles, 0, sizeof tiles);
}

inline void release() {
  configuration = {};
  std::memset(tiles, 0, sizeof tiles);
}

inline void require_configured(int t) {
  require(configuration.palette == 1, "an instruction without ldtilecfg");
  require(t >= 0 && t < 8 && configuration.rows[t] > 0, "a tile that is not configured");
}

inline void zero(int t) {
  require_configured(t);
  tiles[t] = {};
}

inline void load(int t, const void* base, int64_t stride) {
  zero(t);  // what lies outside of the configured part
  for (int r = 0; r < configuration.rows[t]; ++r) {
    std::memcpy(tiles[t].row[r], static_cast<const char*>(base) + r * stride, configuration.row_bytes[t]);
  }
}

inline void store(int t, void* base, int64_t stride) {
  require_configured(t);
  for (int r = 0; r < configuration.rows[t]; ++r) {
    std::memcpy(static_cast<char*>(base) + r * stride, tiles[t].row[r], configuration.row_bytes[t]);
  }
}

inline float number(uint16_t bf16) {
  const uint32_t bits = uint32_t(bf16) << 16;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// sums[m][n] += Σ_k left[m][2k] · right[k][2n] + left[m][2k + 1] · right[k][2n + 1]: a chain of fused operations for
// the even numbers, one for the odd ones, both from zero on; then their sum, then the sum with what was there.
inline void dot_products(int sums, int left, int right) {
  for (const int t : {sums, left, right}) require_configured(t);
  require(sums != left && sums != right && left != right, "tdpbf16ps: a tile is two operands");
  const Configuration& c = configuration;
  require(c.rows[left] == c.rows[sums] && c.row_bytes[right] == c.row_bytes[sums] &&
              c.row_bytes[left] == 4 * c.rows[right] && c.row_bytes[sums] % 4 == 0,
          "tdpbf16ps: shapes that do not fit");
  const TileArithmetic arithmetic;
  for (int m = 0; m < c.rows[sums]; ++m) {
    uint16_t a[32], b[32];
    std::memcpy(a, tiles[left].row[m], 64);
    float even[16] = {}, odd[16] = {}, row[16];
    for (int k = 0; k < c.rows[right]; ++k) {
      std::memcpy(b, tiles[right].row[k], 64);
      const float first = number(a[2 * k]), second = number(a[2 * k + 1]);
      for (int n = 0; n < 16; ++n) {
        even[n] = std::fma(first, number(b[2 * n]), even[n]);
        odd[n] = std::fma(second, number(b[2 * n + 1]), odd[n]);
      }
    }
    std::memcpy(row, tiles[sums].row[m], 64);
    for (int n = 0; n < 16; ++n) row[n] += even[n] + odd[n];
    std::memcpy(tiles[sums].row[m], row, 64);
  }
  for (int m = c.rows[sums]; m < 16; ++m) std::memset(tiles[sums].row[m], 0, 64);
}

// 16 floats of `lower`, then 16 of `upper`, as bf16: to nearest even, subnormal numbers to zero, NaN made quiet.
inline __m512i round_to_bf16(__m512 upper, __m512 lower) {
  float numbers[32];
  uint16_t rounded[32];
  _mm512_storeu_ps(numbers, lower);
  _mm512_storeu_ps(numbers + 16, upper);
  for (int i = 0; i < 32; ++i) {
    uint32_t bits;
    std::memcpy(&bits, numbers + i, sizeof bits);
    const uint32_t magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) {
      bits |= 0x400000;
    } else if (magnitude < 0x800000) {
      bits &= 0x80000000;
    } else {
      bits += 0x7fff + (bits >> 16 & 1);
    }
    rounded[i] = uint16_t(bits >> 16);
  }
  return _mm512_loadu_si512(rounded);
}

}  // namespace emulated_amx

#define __AMX_BF16__ 1
#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig emulated_amx::load_configuration
#define _tile_release emulated_amx::release
#define _tile_zero emulated_amx::zero
#define _tile_loadd emulated_amx::load
#define _tile_stored emulated_amx::store
#define _tile_dpbf16ps emulated_amx::dot_products
#define _mm512_cvtne2ps_pbh emulated_amx::round_to_bf16
