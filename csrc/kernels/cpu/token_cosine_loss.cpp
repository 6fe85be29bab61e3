// Deals token_cosine_loss out to threads; rows are independent.
#include "kernels/token_cosine_loss.h"

#include "isa/kernels.h"
#include "rows.h"

namespace haste::cpu {

void token_cosine_loss_forward(const TokenCosineProblem& problem, void* loss, const ParallelFor& parallel_for) {
  const Kernels& kernels = active_kernels();
  parallel_rows(problem.outer * problem.inner, problem.dim, parallel_for, [&](int64_t begin, int64_t end) {
    kernels.token_cosine_loss_forward(problem, loss, begin, end);
  });
}

void token_cosine_loss_backward(const TokenCosineProblem& problem, const TokenGradient& upstream,
                                void* student_gradient, const ParallelFor& parallel_for) {
  const Kernels& kernels = active_kernels();
  parallel_rows(problem.outer * problem.inner, problem.dim, parallel_for, [&](int64_t begin, int64_t end) {
    kernels.token_cosine_loss_backward(problem, upstream, student_gradient, begin, end);
  });
}

}  // namespace haste::cpu
