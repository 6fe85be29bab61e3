// How an operation is shared out to threads: parts of its rows, and memory for as long as a thread works on them.
#pragma once

#include <algorithm>
#include <cstddef>
#include <new>

#include "kernels/kernel_types.h"

namespace haste::cpu {

// Runs body over ranges of [0, rows), each large enough to be worth a thread, `row_elements` elements to a row.
inline void parallel_rows(int64_t rows, int64_t row_elements, const ParallelFor& parallel_for, const RangeBody& body) {
  constexpr int64_t kElements = 1 << 15;  // some microseconds of work
  const int64_t step = std::max<int64_t>(1, kElements / std::max<int64_t>(1, row_elements));
  const int64_t work_tiles = (rows + step - 1) / step;
  if (work_tiles == 0) return;
  parallel_for(work_tiles, [&](int64_t begin, int64_t end) { body(begin * step, std::min(end * step, rows)); });
}

// Memory on a cache line.
class AlignedScratch {
 public:
  explicit AlignedScratch(size_t bytes) : memory_(::operator new(bytes, kLine)) {}
  ~AlignedScratch() { ::operator delete(memory_, kLine); }
  AlignedScratch(const AlignedScratch&) = delete;
  AlignedScratch& operator=(const AlignedScratch&) = delete;

  void* get() const { return memory_; }

 private:
  static constexpr std::align_val_t kLine{64};
  void* memory_;
};

}  // namespace haste::cpu
