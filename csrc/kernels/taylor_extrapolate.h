// taylor_extrapolate, taylor_extrapolate_blocks and taylor_extrapolate_steps: one kernel for all of them (one step for
// the first two, one layer for the first).
//   out_s = residual + Σ_l gate_{s,l} ⊙ Σ_k w_{s,l,k} · snapshot_{l,k}    accumulated in fp32 (fp64 for Float64)
// The snapshots are read once, however many steps are made of them. A snapshot whose weight is exactly 0 adds nothing,
// and one whose weight is 0 at every step is not read: an unused slot may hold anything, NaN included.
#pragma once

#include "kernel_types.h"

namespace haste {

struct TaylorProblem {
  int64_t steps, layers, slots, batch, tokens, dim;

  const void* snapshots;  // (layers, slots, batch, tokens, dim), last stride 1
  ScalarType snapshot_type;
  int64_t snapshot_stride_layer, snapshot_stride_slot, snapshot_stride_batch, snapshot_stride_token;

  const float* weights;  // (steps, layers, slots); stride 0 over layers where all share one row
  int64_t weight_stride_step, weight_stride_layer, weight_stride_slot;

  const void* gates;  // (steps, layers, batch, dim) of snapshot_type, last stride 1; null: 1
  int64_t gate_stride_step, gate_stride_layer, gate_stride_batch;

  const void* residual;  // (batch, tokens, dim) of out_type, last stride 1; every step has it added; null: 0
  int64_t residual_stride_batch, residual_stride_token;

  void* out;  // (steps, batch, tokens, dim) contiguous
  ScalarType out_type;
};

namespace cpu {
void taylor_extrapolate(const TaylorProblem&, const ParallelFor&);
}  // namespace cpu

namespace cuda {
// Float32, Float16, BFloat16, snapshot and out type in any combination. Returns nullptr, or the error.
const char* taylor_extrapolate(const TaylorProblem&, void* stream);
}  // namespace cuda

}  // namespace haste
