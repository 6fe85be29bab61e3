// taylor_extrapolate, taylor_extrapolate_blocks: schemas, checks, launch, registration. What they compute:
// kernels/taylor_extrapolate.h. The former is the latter with one layer.
#include "kernels/taylor_extrapolate.h"

#include <torch/csrc/stable/library.h>

#include "ops/tensors.h"

namespace haste {
namespace {

// snapshots (L, K, B, N, D), weights (K,) or (L, K), gates (L, B, D), residual (B, N, D)
Tensor blocks(Tensor snapshots, Tensor weights, std::optional<Tensor> gates, std::optional<Tensor> residual) {
  check_shape(snapshots.dim() == 5, "snapshots", snapshots, "(layers, slots, batch, tokens, dim)");
  const int64_t layers = snapshots.size(0), slots = snapshots.size(1), batch = snapshots.size(2),
                tokens = snapshots.size(3), dim = snapshots.size(4);
  const bool shared = weights.dim() == 1;
  check_shape(shared ? weights.size(0) == slots
                     : weights.dim() == 2 && weights.size(0) == layers && weights.size(1) == slots,
              "weights", weights, "(slots,) or (layers, slots)");
  STD_TORCH_CHECK(weights.scalar_type() == TorchType::Float, "weights must be float32");
  check_same_device(snapshots, weights, "weights");

  TaylorProblem p{};
  p.layers = layers, p.slots = slots, p.batch = batch, p.tokens = tokens, p.dim = dim;
  snapshots = with_unit_last_stride(snapshots);
  p.snapshots = snapshots.const_data_ptr();
  p.snapshot_type = scalar_type(snapshots, "snapshots");
  p.snapshot_stride_layer = snapshots.stride(0), p.snapshot_stride_slot = snapshots.stride(1);
  p.snapshot_stride_batch = snapshots.stride(2), p.snapshot_stride_token = snapshots.stride(3);
  p.weights = static_cast<const float*>(weights.const_data_ptr());
  p.weight_stride_layer = shared ? 0 : weights.stride(0);
  p.weight_stride_slot = weights.stride(shared ? 0 : 1);

  Tensor gate;
  if (gates) {
    check_shape(gates->dim() == 3 && gates->size(0) == layers && gates->size(1) == batch && gates->size(2) == dim,
                "gates", *gates, "(layers, batch, dim) of snapshots");
    STD_TORCH_CHECK(gates->scalar_type() == snapshots.scalar_type(), "gates must have the type of snapshots");
    check_same_device(snapshots, *gates, "gates");
    gate = with_unit_last_stride(*gates);
    p.gates = gate.const_data_ptr();
    p.gate_stride_layer = gate.stride(0), p.gate_stride_batch = gate.stride(1);
  }
  Tensor base;
  if (residual) {
    check_shape(residual->dim() == 3 && residual->size(0) == batch && residual->size(1) == tokens &&
                    residual->size(2) == dim,
                "residual", *residual, "(batch, tokens, dim) of snapshots");
    check_same_device(snapshots, *residual, "residual");
    base = with_unit_last_stride(*residual);
    p.residual = base.const_data_ptr();
    p.residual_stride_batch = base.stride(0), p.residual_stride_token = base.stride(1);
  }
  const Tensor& typed = residual ? *residual : snapshots;
  p.out_type = scalar_type(typed, residual ? "residual" : "snapshots");
  Tensor out = torch::stable::new_empty(snapshots, {batch, tokens, dim}, typed.scalar_type());
  p.out = out.mutable_data_ptr();
  if (out.numel() == 0) return out;
  if (snapshots.is_cuda()) {
    const CudaLaunch launch(snapshots);
#ifdef HASTE_WITH_CUDA
    check_launch(cuda::taylor_extrapolate(p, launch.stream()), "taylor_extrapolate");
#endif
  } else {
    cpu::taylor_extrapolate(p, parallel_for());
  }
  return out;
}

Tensor single(Tensor snapshots, Tensor weights, std::optional<Tensor> residual, std::optional<Tensor> gate) {
  check_shape(snapshots.dim() == 4, "snapshots", snapshots, "(slots, batch, tokens, dim)");
  check_shape(weights.dim() == 1, "weights", weights, "(slots,)");
  std::optional<Tensor> gates;
  if (gate) {
    check_shape(gate->dim() == 2, "gate", *gate, "(batch, dim)");
    gates = torch::stable::unsqueeze(*gate, 0);
  }
  return blocks(torch::stable::unsqueeze(snapshots, 0), weights, gates, residual);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(haste, m) {
  m.def("taylor_extrapolate(Tensor snapshots, Tensor weights, Tensor? residual=None, Tensor? gate=None) -> Tensor");
  m.def(
      "taylor_extrapolate_blocks(Tensor snapshots, Tensor weights, Tensor? gates=None, Tensor? residual=None) "
      "-> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(haste, CPU, m) {
  m.impl("taylor_extrapolate", TORCH_BOX(&single));
  m.impl("taylor_extrapolate_blocks", TORCH_BOX(&blocks));
}
STABLE_TORCH_LIBRARY_IMPL(haste, CUDA, m) {
  m.impl("taylor_extrapolate", TORCH_BOX(&single));
  m.impl("taylor_extrapolate_blocks", TORCH_BOX(&blocks));
}

}  // namespace haste
