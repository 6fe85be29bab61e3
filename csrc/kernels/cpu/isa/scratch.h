// Cuts one block of scratch memory into arrays that start on cache lines. With no memory given it only counts.
#pragma once

#include <cstddef>
#include <cstdint>

#include "vector_ops.h"

namespace haste::cpu::HASTE_ISA {
namespace {

class Scratch {
 public:
  explicit Scratch(void* memory) : memory_(static_cast<char*>(memory)) {}

  template <class T>
  T* take(int64_t count) {
    char* array = memory_ + used_;
    used_ += round_up(count * int64_t(sizeof(T)), 64);
    return memory_ ? reinterpret_cast<T*>(array) : nullptr;
  }

  size_t used() const { return used_; }

 private:
  char* memory_;
  size_t used_ = 0;
};

}  // namespace
}  // namespace haste::cpu::HASTE_ISA
