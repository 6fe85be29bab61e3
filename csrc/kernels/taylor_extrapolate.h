// taylor_extrapolate and taylor_extrapolate_blocks: one kernel for both (layers = 1 for the former).
//   out = residual + Σ_l gate_l ⊙ Σ_k w_{l,k} · snapshot_{l,k}        accumulated in fp32 (fp64 for Float64)
// A snapshot whose weight is exactly 0 is not read: an unused slot may hold anything, NaN included.
#pragma once

#include "types.h"

namespace haste {

struct TaylorProblem {
  int64_t layers, slots, batch, tokens, dim;

  const void* snapshots;  // (layers, slots, batch, tokens, dim), last stride 1
  ScalarType snapshot_type;
  int64_t snapshot_stride_layer, snapshot_stride_slot, snapshot_stride_batch, snapshot_stride_token;

  const float* weights;  // (layers, slots); stride 0 over layers where all share one row
  int64_t weight_stride_layer, weight_stride_slot;

  const void* gates;  // (layers, batch, dim) of snapshot_type, last stride 1; null: 1
  int64_t gate_stride_layer, gate_stride_batch;

  const void* residual;  // (batch, tokens, dim) of out_type, last stride 1; null: 0
  int64_t residual_stride_batch, residual_stride_token;

  void* out;  // (batch, tokens, dim) contiguous
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
