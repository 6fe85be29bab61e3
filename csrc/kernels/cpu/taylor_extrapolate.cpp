// Shares taylor_extrapolate out to threads; tokens are independent.
#include "kernels/taylor_extrapolate.h"

#include "isa/kernels.h"
#include "sharing.h"

namespace haste::cpu {

void taylor_extrapolate(const TaylorProblem& problem, const ParallelFor& parallel_for) {
  const bool in_double = problem.snapshot_type == ScalarType::Float64 || problem.out_type == ScalarType::Float64;
  const TaylorKernels& kernels = active_kernels(in_double).taylor_extrapolate;
  const int64_t row_elements = problem.dim * (problem.steps + problem.layers * problem.slots);
  parallel_rows(problem.batch * problem.tokens, row_elements, parallel_for, [&](int64_t begin, int64_t end) {
    AlignedScratch scratch(kernels.scratch(problem));
    kernels.extrapolate(problem, begin, end, scratch.get());
  });
}

}  // namespace haste::cpu
