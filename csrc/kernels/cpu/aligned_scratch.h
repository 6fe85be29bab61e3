// Scratch memory on a cache line, for as long as a thread works on its tasks.
#pragma once

#include <cstddef>
#include <new>

namespace haste::cpu {

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
