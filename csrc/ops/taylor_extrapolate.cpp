// taylor_extrapolate, taylor_extrapolate_blocks, taylor_extrapolate_steps: schemas, checks, launch, registration. What
// they compute: kernels/taylor_extrapolate.h. The first is the second with one layer, the second the third with one step.
#include "kernels/taylor_extrapolate.h"

#include <torch/csrc/stable/library.h>

#include <initializer_list>
#include <vector>

#include "ops/common.h"

namespace haste {
namespace {

bool has_shape(const Tensor& tensor, std::initializer_list<int64_t> shape) {
  if (tensor.dim() != int64_t(shape.size())) return false;
  int64_t i = 0;
  for (const int64_t size : shape) {
    if (tensor.size(i++) != size) return false;
  }
  return true;
}

// snapshots (L, K, B, N, D), weights (…, K) or (…, L, K), gates (…, L, B, D), residual (B, N, D) → (…, B, N, D), where …
// are the steps, if `stacked`, or nothing for a single one.
Tensor extrapolate(const Tensor& given, const Tensor& weights, const std::optional<Tensor>& gates,
                   const std::optional<Tensor>& residual, bool stacked) {
  STD_TORCH_CHECK(weights.scalar_type() == TorchType::Float, "weights must be float32");
  check_same_device(given, weights, "weights");
  const Tensor snapshots = with_unit_last_stride(given);
  TaylorProblem p{};
  p.steps = stacked ? weights.size(0) : 1;
  p.layers = snapshots.size(0), p.slots = snapshots.size(1);
  p.batch = snapshots.size(2), p.tokens = snapshots.size(3), p.dim = snapshots.size(4);
  p.snapshots = snapshots.const_data_ptr();
  p.snapshot_type = scalar_type(snapshots, "snapshots");
  p.snapshot_stride_layer = snapshots.stride(0), p.snapshot_stride_slot = snapshots.stride(1);
  p.snapshot_stride_batch = snapshots.stride(2), p.snapshot_stride_token = snapshots.stride(3);
  const int64_t last = weights.dim() - 1;
  p.weights = static_cast<const float*>(weights.const_data_ptr());
  p.weight_stride_step = stacked ? weights.stride(0) : 0;
  p.weight_stride_layer = last == (stacked ? 2 : 1) ? weights.stride(last - 1) : 0;
  p.weight_stride_slot = weights.stride(last);

  Tensor gate, base;
  if (gates) {
    STD_TORCH_CHECK(gates->scalar_type() == snapshots.scalar_type(), "gates must have the type of snapshots");
    check_same_device(snapshots, *gates, "gates");
    gate = with_unit_last_stride(*gates);
    p.gates = gate.const_data_ptr();
    const int64_t layer = stacked ? 1 : 0;
    p.gate_stride_step = stacked ? gate.stride(0) : 0;
    p.gate_stride_layer = gate.stride(layer), p.gate_stride_batch = gate.stride(layer + 1);
  }
  if (residual) {
    check_shape(has_shape(*residual, {p.batch, p.tokens, p.dim}), "residual", *residual,
                "(batch, tokens, dim) of snapshots");
    check_same_device(snapshots, *residual, "residual");
    base = with_unit_last_stride(*residual);
    p.residual = base.const_data_ptr();
    p.residual_stride_batch = base.stride(0), p.residual_stride_token = base.stride(1);
  }
  const Tensor& typed = residual ? *residual : snapshots;
  p.out_type = scalar_type(typed, residual ? "residual" : "snapshots");
  std::vector<int64_t> shape{p.batch, p.tokens, p.dim};
  if (stacked) shape.insert(shape.begin(), p.steps);
  Tensor out = torch::stable::new_empty(snapshots, shape, typed.scalar_type());
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

// snapshots (K, B, N, D) or (L, K, B, N, D), weights (S, K) or (S, L, K), gates (S, L, B, D)
Tensor steps(Tensor snapshots, Tensor weights, std::optional<Tensor> gates) {
  if (snapshots.dim() == 4) snapshots = torch::stable::unsqueeze(snapshots, 0);
  check_shape(snapshots.dim() == 5, "snapshots", snapshots, "(slots, batch, tokens, dim), or with layers before them");
  const int64_t layers = snapshots.size(0), slots = snapshots.size(1);
  const int64_t number = weights.dim() > 0 ? weights.size(0) : 0;
  check_shape(has_shape(weights, {number, slots}) || has_shape(weights, {number, layers, slots}), "weights", weights,
              "(steps, slots) or (steps, layers, slots)");
  if (gates) {
    check_shape(has_shape(*gates, {number, layers, snapshots.size(2), snapshots.size(4)}), "gates", *gates,
                "(steps, layers, batch, dim) of weights and snapshots");
  }
  return extrapolate(snapshots, weights, gates, std::nullopt, /*stacked=*/true);
}

// snapshots (L, K, B, N, D), weights (K,) or (L, K), gates (L, B, D), residual (B, N, D): one step
Tensor blocks(Tensor snapshots, Tensor weights, std::optional<Tensor> gates, std::optional<Tensor> residual) {
  check_shape(snapshots.dim() == 5, "snapshots", snapshots, "(layers, slots, batch, tokens, dim)");
  const int64_t layers = snapshots.size(0), slots = snapshots.size(1);
  check_shape(has_shape(weights, {slots}) || has_shape(weights, {layers, slots}), "weights", weights,
              "(slots,) or (layers, slots)");
  if (gates) {
    check_shape(has_shape(*gates, {layers, snapshots.size(2), snapshots.size(4)}), "gates", *gates,
                "(layers, batch, dim) of snapshots");
  }
  return extrapolate(snapshots, weights, gates, residual, /*stacked=*/false);
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
  m.def("taylor_extrapolate_steps(Tensor snapshots, Tensor weights, Tensor? gates=None) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(haste, CPU, m) {
  m.impl("taylor_extrapolate", TORCH_BOX(&single));
  m.impl("taylor_extrapolate_blocks", TORCH_BOX(&blocks));
  m.impl("taylor_extrapolate_steps", TORCH_BOX(&steps));
}
STABLE_TORCH_LIBRARY_IMPL(haste, CUDA, m) {
  m.impl("taylor_extrapolate", TORCH_BOX(&single));
  m.impl("taylor_extrapolate_blocks", TORCH_BOX(&blocks));
  m.impl("taylor_extrapolate_steps", TORCH_BOX(&steps));
}

}  // namespace haste
