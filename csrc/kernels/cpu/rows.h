// How the memory-bound operations are dealt out: pieces of rows large enough to be worth a thread.
#pragma once

#include <algorithm>

#include "kernels/types.h"

namespace haste::cpu {

// Runs body over pieces of [0, rows), `row_elements` elements to a row.
inline void parallel_rows(int64_t rows, int64_t row_elements, const ParallelFor& parallel_for, const RangeBody& body) {
  constexpr int64_t kElements = 1 << 15;  // some microseconds of work
  const int64_t step = std::max<int64_t>(1, kElements / std::max<int64_t>(1, row_elements));
  const int64_t pieces = (rows + step - 1) / step;
  if (pieces == 0) return;
  parallel_for(pieces, [&](int64_t begin, int64_t end) { body(begin * step, std::min(end * step, rows)); });
}

}  // namespace haste::cpu
