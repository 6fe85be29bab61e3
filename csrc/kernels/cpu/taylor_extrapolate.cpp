// Deals taylor_extrapolate out to threads; tokens are independent.
#include "kernels/taylor_extrapolate.h"

#include "aligned_scratch.h"
#include "isa/kernels.h"
#include "rows.h"

namespace haste::cpu {

void taylor_extrapolate(const TaylorProblem& problem, const ParallelFor& parallel_for) {
  const Kernels& kernels = active_kernels();
  const int64_t row_elements = problem.dim * (problem.steps + problem.layers * problem.slots);
  parallel_rows(problem.batch * problem.tokens, row_elements, parallel_for, [&](int64_t begin, int64_t end) {
    AlignedScratch scratch(kernels.taylor_extrapolate_scratch(problem));
    kernels.taylor_extrapolate(problem, begin, end, scratch.get());
  });
}

}  // namespace haste::cpu
