// taylor_extrapolate, a token at a time: every snapshot row with a weight is read once and the result written once,
// with the sum over layers kept in the first-level cache. Memory sets the speed.
#include "convert.h"
#include "kernels.h"
#include "scratch.h"

namespace haste::cpu::HASTE_ISA {
namespace {

// The many rows of several layers are too many and too short for the processor to read ahead by itself.
template <int Count, class Snapshot>
HASTE_INLINE void read_ahead(const Snapshot* row) {
  for (int d = 0; d < Count; d += 64 / int(sizeof(Snapshot))) __builtin_prefetch(row + d, 0, 2);
}

// One layer's snapshots of one token, and the weights of its slots.
template <class Snapshot>
struct SlotRows {
  const Snapshot* first;
  const float* weights;
  int64_t slots, stride, weight_stride;
  int64_t ahead;  // to what is read next of the same snapshots

  // Σ_k w_k · snapshot_k, `Vectors` vectors from element d on. A slot of weight 0 is not read.
  template <class T, int Vectors, class Load>
  HASTE_INLINE void sum_slots(int64_t d, const Load& load_lanes, Vector<T> (&sum)[Vectors]) const {
    for (int v = 0; v < Vectors; ++v) sum[v] = Vector<T>{};
    for (int64_t k = 0; k < slots; ++k) {
      const T weight = weights[k * weight_stride];
      if (weight == 0) continue;
      const Snapshot* row = first + k * stride + d;
      if (ahead) read_ahead<Vectors * kLanes<T>>(row + ahead);
      for (int v = 0; v < Vectors; ++v) sum[v] += weight * load_lanes(row + v * kLanes<T>);
    }
  }
};

// total[d …] += gate · Σ_k w_k · snapshot_k, `Vectors` whole vectors from element d on.
template <int Vectors, class T, class Snapshot>
HASTE_INLINE void add_vectors(const SlotRows<Snapshot>& rows, const Snapshot* gate, int64_t d, T* total) {
  Vector<T> sum[Vectors];
  rows.template sum_slots<T>(d, [](const Snapshot* from) { return load_as<T>(from); }, sum);
  for (int v = 0; v < Vectors; ++v) {
    const int64_t at = d + v * kLanes<T>;
    store(total + at, load(total + at) + (gate ? sum[v] * load_as<T>(gate + at) : sum[v]));
  }
}

// total += gate · Σ_k w_k · snapshot_k; a null gate is 1. `total` has room for whole vectors.
template <class T, class Snapshot>
void add_layer(const SlotRows<Snapshot>& rows, const Snapshot* gate, int64_t dim, T* total) {
  constexpr int L = kLanes<T>;
  int64_t d = 0;
  for (; d + 4 * L <= dim; d += 4 * L) add_vectors<4>(rows, gate, d, total);
  for (; d + 2 * L <= dim; d += 2 * L) add_vectors<2>(rows, gate, d, total);
  for (; d < dim; d += L) {
    const int64_t count = dim - d < L ? dim - d : L;
    Vector<T> sum[1];
    rows.template sum_slots<T>(d, [count](const Snapshot* from) { return load_first<T>(from, count); }, sum);
    store(total + d, load(total + d) + (gate ? sum[0] * load_first<T>(gate + d, count) : sum[0]));
  }
}

template <class T, class Element>
void read_row(const Element* from, int64_t dim, T* to) {
  int64_t d = 0;
  for (; d + kLanes<T> <= dim; d += kLanes<T>) store(to + d, load_as<T>(from + d));
  if (d < dim) store(to + d, load_first<T>(from + d, dim - d));
}

template <class T, class Element>
void write_row(const T* from, int64_t dim, Element* to) {
  int64_t d = 0;
  for (; d + kLanes<T> <= dim; d += kLanes<T>) narrow(to + d, load(from + d));
  if (d < dim) store_first<T>(to + d, load(from + d), dim - d);
}

template <class T, class Snapshot>
void add_layers(const TaylorProblem& problem, const Snapshot* snapshots, int64_t batch, int64_t token, T* total) {
  const auto* gates = static_cast<const Snapshot*>(problem.gates);
  for (int64_t layer = 0; layer < problem.layers; ++layer) {
    const Snapshot* first = snapshots + layer * problem.snapshot_stride_layer + batch * problem.snapshot_stride_batch +
                            token * problem.snapshot_stride_token;
    const SlotRows<Snapshot> rows{first, problem.weights + layer * problem.weight_stride_layer, problem.slots,
                                  problem.snapshot_stride_slot, problem.weight_stride_slot,
                                  problem.layers > 1 ? problem.snapshot_stride_token : 0};
    const int64_t gate = layer * problem.gate_stride_layer + batch * problem.gate_stride_batch;
    add_layer(rows, gates ? gates + gate : nullptr, problem.dim, total);
  }
}

template <class T>
void extrapolate_token(const TaylorProblem& problem, int64_t batch, int64_t token, T* total) {
  const int64_t dim = problem.dim;
  if (problem.residual) {
    with_elements(problem.residual, problem.out_type, [&](auto* residual) {
      read_row(residual + batch * problem.residual_stride_batch + token * problem.residual_stride_token, dim, total);
    });
  } else {
    for (int64_t d = 0; d < round_up(dim, kLanes<T>); ++d) total[d] = 0;
  }
  with_elements(problem.snapshots, problem.snapshot_type,
                [&](auto* snapshots) { add_layers(problem, snapshots, batch, token, total); });
  with_elements(problem.out, problem.out_type,
                [&](auto* out) { write_row(total, dim, out + (batch * problem.tokens + token) * dim); });
}

template <class T>
void extrapolate(const TaylorProblem& problem, int64_t begin, int64_t end, void* memory) {
  T* total = Scratch(memory).take<T>(round_up(problem.dim, kLanes<T>));
  for (int64_t row = begin; row < end; ++row) {
    extrapolate_token(problem, row / problem.tokens, row % problem.tokens, total);
  }
}

HASTE_INLINE bool in_double(const TaylorProblem& problem) {
  return problem.snapshot_type == ScalarType::Float64 || problem.out_type == ScalarType::Float64;
}

}  // namespace

void taylor_extrapolate(const TaylorProblem& problem, int64_t begin, int64_t end, void* scratch) {
  in_double(problem) ? extrapolate<double>(problem, begin, end, scratch)
                     : extrapolate<float>(problem, begin, end, scratch);
}

}  // namespace haste::cpu::HASTE_ISA
