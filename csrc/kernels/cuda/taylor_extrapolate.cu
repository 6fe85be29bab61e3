// taylor_extrapolate: every snapshot is read once, the result written once; bound by memory alone.
//
// A thread owns 8 neighbouring channels of one token. It fetches 4 slots before it adds them up, so that as many
// 16-byte loads are under way at once. The weights lie in device memory: one CUDA graph serves every step.
#include "../taylor_extrapolate.h"

#include <algorithm>

#include "element_type.cuh"
#include "vector.cuh"

namespace haste::cuda {
namespace {

constexpr int kBlockThreads = 256;
constexpr int kSlotsAtOnce = 4;
constexpr int64_t kLargestGridY = 65535;

struct Arguments {
  TaylorProblem problem;
  int vectors_per_token, vectors;  // vectors of 8 channels in a token, in one batch entry
  bool snapshots_aligned, gates_aligned, residual_aligned, out_aligned;
};

// Σ_k w_k · snapshot_k of one layer. A slot whose weight is 0 is not read; the branch is the same for all threads.
template <typename T>
__device__ void forecast(float (&sum)[kVector], const TaylorProblem& p, int64_t layer, int64_t offset, int count,
                         bool aligned) {
  const float* weights = p.weights + layer * p.weight_stride_layer;
  const T* snapshots = static_cast<const T*>(p.snapshots) + layer * p.snapshot_stride_layer + offset;
  for (int64_t first = 0; first < p.slots; first += kSlotsAtOnce) {
    float weight[kSlotsAtOnce], values[kSlotsAtOnce][kVector];
#pragma unroll
    for (int k = 0; k < kSlotsAtOnce; ++k) {
      weight[k] = first + k < p.slots ? weights[(first + k) * p.weight_stride_slot] : 0.f;
    }
#pragma unroll
    for (int k = 0; k < kSlotsAtOnce; ++k) {
      if (weight[k] != 0.f) load(values[k], snapshots + (first + k) * p.snapshot_stride_slot, count, aligned);
    }
#pragma unroll
    for (int k = 0; k < kSlotsAtOnce; ++k) {
      if (weight[k] == 0.f) continue;
#pragma unroll
      for (int i = 0; i < kVector; ++i) sum[i] = fmaf(weight[k], values[k][i], sum[i]);
    }
  }
}

template <typename T, typename Out>
__global__ void __launch_bounds__(kBlockThreads) extrapolate_kernel(Arguments arguments) {
  const TaylorProblem& p = arguments.problem;
  const int64_t vector = static_cast<int64_t>(blockIdx.x) * kBlockThreads + threadIdx.x;
  if (vector >= arguments.vectors) return;
  const int token = static_cast<int>(vector) / arguments.vectors_per_token;
  const int channel = static_cast<int>(vector) % arguments.vectors_per_token * kVector;
  const int count = static_cast<int>(p.dim) - channel;

  for (int64_t batch = blockIdx.y; batch < p.batch; batch += gridDim.y) {
    float total[kVector] = {};
    if (p.residual != nullptr) {
      load(total, static_cast<const Out*>(p.residual) + batch * p.residual_stride_batch +
                      token * p.residual_stride_token + channel,
           count, arguments.residual_aligned);
    }
    const int64_t offset = batch * p.snapshot_stride_batch + token * p.snapshot_stride_token + channel;
    for (int64_t layer = 0; layer < p.layers; ++layer) {
      float sum[kVector] = {}, gate[kVector];
      forecast<T>(sum, p, layer, offset, count, arguments.snapshots_aligned);
      if (p.gates != nullptr) {
        load(gate, static_cast<const T*>(p.gates) + layer * p.gate_stride_layer + batch * p.gate_stride_batch + channel,
             count, arguments.gates_aligned);
      }
#pragma unroll
      for (int i = 0; i < kVector; ++i) total[i] = fmaf(p.gates != nullptr ? gate[i] : 1.f, sum[i], total[i]);
    }
    Out* out = static_cast<Out*>(p.out) + (batch * p.tokens + token) * p.dim + channel;
    store(out, total, count, arguments.out_aligned);
  }
}

template <typename T, typename Out>
const char* launch_extrapolate(const TaylorProblem& p, void* stream) {
  constexpr int64_t size = sizeof(T), out_size = sizeof(Out);
  const int64_t vectors_per_token = ceil_div(p.dim, kVector);
  const int64_t vectors = p.tokens * vectors_per_token;
  if (!fits_int(vectors) || !fits_int(p.dim)) {
    return "taylor_extrapolate on CUDA takes fewer than 2^31 vectors of 8 channels per batch entry";
  }
  const bool whole = p.dim % kVector == 0;
  Arguments arguments{p, static_cast<int>(vectors_per_token), static_cast<int>(vectors), false, false, false, false};
  arguments.snapshots_aligned =
      whole && aligned_16(p.snapshots) && stride_aligned_16(p.layers, p.snapshot_stride_layer, size) &&
      stride_aligned_16(p.slots, p.snapshot_stride_slot, size) &&
      stride_aligned_16(p.batch, p.snapshot_stride_batch, size) &&
      stride_aligned_16(p.tokens, p.snapshot_stride_token, size);
  arguments.gates_aligned = whole && aligned_16(p.gates) && stride_aligned_16(p.layers, p.gate_stride_layer, size) &&
                            stride_aligned_16(p.batch, p.gate_stride_batch, size);
  arguments.residual_aligned = whole && aligned_16(p.residual) &&
                               stride_aligned_16(p.batch, p.residual_stride_batch, out_size) &&
                               stride_aligned_16(p.tokens, p.residual_stride_token, out_size);
  arguments.out_aligned = whole && aligned_16(p.out);
  const dim3 grid(static_cast<unsigned>(ceil_div(vectors, kBlockThreads)),
                  static_cast<unsigned>(std::min(p.batch, kLargestGridY)));
  return launch(extrapolate_kernel<T, Out>, grid, kBlockThreads, 0, stream, arguments);
}

}  // namespace

const char* taylor_extrapolate(const TaylorProblem& problem, void* stream) {
  if (problem.batch == 0 || problem.tokens == 0 || problem.dim == 0) return nullptr;
  return dispatch_type(problem.snapshot_type, [&](auto snapshot) {
    return dispatch_type(problem.out_type, [&](auto out) {
      return launch_extrapolate<decltype(snapshot), decltype(out)>(problem, stream);
    });
  });
}

}  // namespace haste::cuda
