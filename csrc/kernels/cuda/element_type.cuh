// From a ScalarType to the element type of a template.
#pragma once

#include "../kernel_types.h"
#include "arch.cuh"

namespace haste::cuda {

// The element types by the names that HASTE_ELEMENT takes.
namespace elements {
using float32 = float;
using float16 = __half;
using bfloat16 = __nv_bfloat16;
}  // namespace elements

// Returns run(T{}) for the element type T that `type` names.
template <typename Run>
const char* dispatch_type(ScalarType type, const Run& run) {
  switch (type) {
    case ScalarType::Float32: return run(float{});
    case ScalarType::Float16: return run(__half{});
    case ScalarType::BFloat16: return run(__nv_bfloat16{});
    case ScalarType::Float64: break;
  }
  return "the CUDA kernels take float32, float16 and bfloat16, not float64";
}

}  // namespace haste::cuda
