// Small kernels on the primitives of arch_hopper.cuh, only for the tests; see hopper_primitives.cpp.
#pragma once

#include <kernels/attn_align_loss.h>

#include <string>

namespace haste::cuda {

// One panel of `rows` tokens as the copy engine leaves it in shared memory.
struct PanelProblem {
  AttnOperand operand;
  int64_t batch, heads, tokens;
  int rows, column, token, head, sample;
};
const char* load_one_panel(const PanelProblem&, uint16_t* panel);

// c = A·B, 64 × columns, over a contraction of `depth`. A and B lie in memory row by row, A as (64, depth) or,
// transposed, (depth, 64), B as (columns, depth) or, transposed, (depth, columns).
struct ProductProblem {
  const void *a, *b;
  ScalarType type;
  int columns, depth;
  bool transpose_a, transpose_b;
  // "copy engine", "registers", "stored" by the threads themselves; "stored without fence", "changing registers": faults
  std::string a_from;
};
const char* multiply(const ProductProblem&, float* c);

// c (64 × 64) = A (64 × 64) times the sum of all tiles of 64 tokens of B (tokens × 64), transposed: tiles stream through
// a ring of stages from a producer warp to a warpgroup. With a fault of this name, or "none".
const char* run_ring(const void* a, const void* b, int64_t tokens, const std::string& fault, float* c);

// Two warpgroups hand 128 numbers back and forth, doubled each time. With a fault of this name, or "none".
const char* run_relay(const std::string& fault, float* numbers);

}  // namespace haste::cuda
