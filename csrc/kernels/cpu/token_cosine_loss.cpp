// Shares token_cosine_loss out to threads; rows are independent.
#include "kernels/token_cosine_loss.h"

#include "isa/kernels.h"
#include "sharing.h"

namespace haste::cpu {
namespace {

const TokenCosineKernels& kernels_for(const TokenCosineProblem& problem) {
  return active_kernels(problem.student.type == ScalarType::Float64).token_cosine_loss;
}

}  // namespace

void token_cosine_loss_forward(const TokenCosineProblem& problem, void* loss, const ParallelFor& parallel_for) {
  const TokenCosineKernels& kernels = kernels_for(problem);
  parallel_rows(problem.outer * problem.inner, problem.dim, parallel_for,
                [&](int64_t begin, int64_t end) { kernels.forward(problem, loss, begin, end); });
}

void token_cosine_loss_backward(const TokenCosineProblem& problem, const TokenGradient& grad_out,
                                void* student_gradient, const ParallelFor& parallel_for) {
  const TokenCosineKernels& kernels = kernels_for(problem);
  parallel_rows(problem.outer * problem.inner, problem.dim, parallel_for,
                [&](int64_t begin, int64_t end) { kernels.backward(problem, grad_out, student_gradient, begin, end); });
}

}  // namespace haste::cpu
