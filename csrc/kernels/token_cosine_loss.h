// token_cosine_loss: −cos(student, teacher) per token, and its gradient with respect to the student:
//   n_s = max(‖z_s‖, 1e-12), ẑ = z / n        loss = −Σ ẑ_s·ẑ_t
//   d z_s = −(g / n_s) (ẑ_t − cos·ẑ_s)         (no second term where the norm is clamped, as F.normalize)
#pragma once

#include "kernel_types.h"

namespace haste {

// (outer, inner, dim) vectors where they lie: strides in elements, the last one is 1.
struct TokenOperand {
  const void* data;
  ScalarType type;
  int64_t stride_outer, stride_inner;
};

struct TokenCosineProblem {
  int64_t outer, inner, dim;
  TokenOperand student, teacher;  // their types may differ
};

// Gradient of the rows: float, or double where the student is Float64; strides may be 0.
struct TokenGradient {
  const void* data;
  int64_t stride_outer, stride_inner;
};

namespace cpu {
// loss: (outer, inner) contiguous, double where the student is Float64, else float.
void token_cosine_loss_forward(const TokenCosineProblem&, void* loss, const ParallelFor&);
// student_gradient: (outer, inner, dim) contiguous, of the student's type.
void token_cosine_loss_backward(const TokenCosineProblem&, const TokenGradient&, void* student_gradient,
                                const ParallelFor&);
}  // namespace cpu

namespace cuda {
// Float32, Float16, BFloat16 in any combination. Returns nullptr, or what went wrong in one sentence.
const char* token_cosine_loss_forward(const TokenCosineProblem&, float* loss, void* stream);
const char* token_cosine_loss_backward(const TokenCosineProblem&, const TokenGradient&, void* student_gradient,
                                       void* stream);
}  // namespace cuda

}  // namespace haste
