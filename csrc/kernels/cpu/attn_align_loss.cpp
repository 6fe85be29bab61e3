// Shares attn_align_loss out to threads. The bits of a result do not depend on how that was done: every row, and
// every sum over queries or keys, is built in one fixed order whatever block it is computed in.
#include "kernels/attn_align_loss.h"

#include <algorithm>
#include <atomic>

#include "isa/kernels.h"
#include "sharing.h"

namespace haste::cpu {
namespace {

// Queries (or keys) of a block when a (batch, head) is divided: a multiple of every kernel's own blocks, and enough
// of them to make packing the other side a matter of one percent.
constexpr int64_t kChunk = 512;

int64_t chunks(int64_t tokens) { return (tokens + kChunk - 1) / kChunk; }

// The `index`-th block when each (batch, head) is divided by queries, or by keys.
AttnBlock block_of_queries(const AttnAlignProblem& problem, int64_t index) {
  const int64_t map = index / chunks(problem.tokens), first = index % chunks(problem.tokens) * kChunk;
  return {map / problem.heads, map % problem.heads, first, std::min(first + kChunk, problem.tokens), 0, problem.tokens};
}

AttnBlock block_of_keys(const AttnAlignProblem& problem, int64_t index) {
  AttnBlock block = block_of_queries(problem, index);
  std::swap(block.query_begin, block.key_begin);
  std::swap(block.query_end, block.key_end);
  return block;
}

// Into how many ranges, run side by side, the caller's threads divide `count` tasks.
int64_t count_threads(const ParallelFor& parallel_for, int64_t count) {
  std::atomic<int64_t> seen{0};
  parallel_for(count, [&](int64_t, int64_t) { ++seen; });
  return std::max<int64_t>(seen, 1);
}

// One block per (batch, head) yields dq and dk from one set of logits. Two passes, dq by queries and dk by keys,
// compute the logits twice, half as much again in all, but keep more threads busy.
bool in_one_pass(const AttnAlignProblem& problem, const ParallelFor& parallel_for) {
  const int64_t maps = problem.batch * problem.heads, blocks = maps * chunks(problem.tokens);
  if (blocks == maps) return true;
  const int64_t threads = count_threads(parallel_for, blocks);
  const auto rounds = [&](int64_t tasks) { return (tasks + threads - 1) / threads; };
  return 2 * rounds(maps) * chunks(problem.tokens) <= 3 * rounds(blocks);
}

const AttnAlignKernels& kernels_for(const AttnAlignProblem& problem) {
  return active_kernels(problem.student_q.type == ScalarType::Float64).attn_align_loss;
}

template <class Run>
void run_blocks(int64_t count, size_t scratch_bytes, const ParallelFor& parallel_for, const Run& run) {
  parallel_for(count, [&](int64_t begin, int64_t end) {
    AlignedScratch scratch(scratch_bytes);
    for (int64_t index = begin; index < end; ++index) run(index, scratch.get());
  });
}

}  // namespace

void attn_align_loss_forward(const AttnAlignProblem& problem, const AttnAlignRows& rows,
                             const ParallelFor& parallel_for) {
  const AttnAlignKernels& kernels = kernels_for(problem);
  const int64_t blocks = problem.batch * problem.heads * chunks(problem.tokens);
  if (blocks == 0) return;
  run_blocks(blocks, kernels.scratch(problem, problem.tokens), parallel_for, [&](int64_t index, void* scratch) {
    kernels.forward(problem, rows, block_of_queries(problem, index), scratch);
  });
}

void attn_align_loss_backward(const AttnAlignProblem& problem, const AttnAlignBackward& gradient,
                              const ParallelFor& parallel_for) {
  const AttnAlignKernels& kernels = kernels_for(problem);
  const int64_t maps = problem.batch * problem.heads, blocks = maps * chunks(problem.tokens);
  const bool query_wanted = gradient.student_q.data, key_wanted = gradient.student_k.data;
  if (blocks == 0 || !(query_wanted || key_wanted)) return;

  if (query_wanted && key_wanted && in_one_pass(problem, parallel_for)) {
    run_blocks(maps, kernels.scratch(problem, problem.tokens), parallel_for, [&](int64_t index, void* scratch) {
      const AttnBlock whole{index / problem.heads, index % problem.heads, 0, problem.tokens, 0, problem.tokens};
      kernels.backward(problem, gradient, whole, scratch);
    });
    return;
  }
  if (query_wanted) {
    AttnAlignBackward queries = gradient;
    queries.student_k.data = nullptr;
    run_blocks(blocks, kernels.scratch(problem, problem.tokens), parallel_for, [&](int64_t index, void* scratch) {
      kernels.backward(problem, queries, block_of_queries(problem, index), scratch);
    });
  }
  if (key_wanted) {
    AttnAlignBackward keys = gradient;
    keys.student_q.data = nullptr;
    run_blocks(
        blocks, kernels.scratch(problem, std::min(kChunk, problem.tokens)), parallel_for,
        [&](int64_t index, void* scratch) { kernels.backward(problem, keys, block_of_keys(problem, index), scratch); });
  }
}

}  // namespace haste::cpu
