// taylor_extrapolate, a token at a time: every snapshot row with a weight is read once, whatever the number of steps, and
// the results written once, with the sums over layers kept in the first-level cache. Memory sets the speed.
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

// One layer of one token: its snapshots, the weights of its slots at `Steps` steps, and its gates at those.
template <class Snapshot>
struct LayerRows {
  const Snapshot* first;
  int64_t slots, stride;
  const float* weights;
  int64_t weight_stride, weight_stride_step;
  const Snapshot* gates;  // null: 1
  int64_t gate_stride_step;
  int64_t ahead;  // to what is read next of the same snapshots

  // Σ_k w_{s,k} · snapshot_k, `Vectors` vectors from element d on. What a slot of weight 0 holds must not come in.
  template <class T, int Steps, int Vectors, class Load>
  HASTE_INLINE void sum_slots(int64_t d, const Load& load_lanes, Vector<T> (&sum)[Steps][Vectors]) const {
    for (int s = 0; s < Steps; ++s) {
      for (int v = 0; v < Vectors; ++v) sum[s][v] = Vector<T>{};
    }
    for (int64_t k = 0; k < slots; ++k) {
      T weight[Steps];
      bool used = false;
      for (int s = 0; s < Steps; ++s) {
        weight[s] = weights[s * weight_stride_step + k * weight_stride];
        used |= weight[s] != 0;
      }
      if (!used) continue;
      const Snapshot* row = first + k * stride + d;
      if (ahead) read_ahead<Vectors * kLanes<T>>(row + ahead);
      Vector<T> lanes[Vectors];
      for (int v = 0; v < Vectors; ++v) lanes[v] = load_lanes(row + v * kLanes<T>);
      for (int s = 0; s < Steps; ++s) {
        if (weight[s] == 0) continue;
        for (int v = 0; v < Vectors; ++v) sum[s][v] += weight[s] * lanes[v];
      }
    }
  }

  // total_s[d …] += gate_s · Σ_k w_{s,k} · snapshot_k, `Vectors` vectors from element d on.
  template <int Steps, int Vectors, class T, class Load>
  HASTE_INLINE void add_vectors(int64_t d, const Load& load_lanes, T* total, int64_t total_stride) const {
    Vector<T> sum[Steps][Vectors];
    sum_slots<T>(d, load_lanes, sum);
    for (int s = 0; s < Steps; ++s) {
      for (int v = 0; v < Vectors; ++v) {
        const int64_t at = d + v * kLanes<T>;
        T* to = total + s * total_stride + at;
        const Vector<T> term = gates ? sum[s][v] * load_lanes(gates + s * gate_stride_step + at) : sum[s][v];
        store(to, load(to) + term);
      }
    }
  }
};

// total_s += gate_s · Σ_k w_{s,k} · snapshot_k for `Steps` steps. `total` has room for whole vectors.
template <int Steps, class T, class Snapshot>
void add_steps(const LayerRows<Snapshot>& rows, int64_t dim, T* total, int64_t total_stride) {
  constexpr int L = kLanes<T>;
  constexpr int kMost = Steps * 4 <= kVectorRegisters / 2 ? 4 : 2;  // vectors whose sums are kept in registers
  const auto whole = [](const Snapshot* from) { return load_as<T>(from); };
  int64_t d = 0;
  for (; d + kMost * L <= dim; d += kMost * L) rows.template add_vectors<Steps, kMost>(d, whole, total, total_stride);
  for (; d + L <= dim; d += L) rows.template add_vectors<Steps, 1>(d, whole, total, total_stride);
  if (d < dim) {
    const int64_t count = dim - d;
    const auto some = [count](const Snapshot* from) { return load_first<T>(from, count); };
    rows.template add_vectors<Steps, 1>(d, some, total, total_stride);
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

// All steps of one layer, a few at a time: the later ones find the snapshots in the cache.
template <class T, class Snapshot>
void add_layer(const TaylorProblem& problem, LayerRows<Snapshot> rows, T* total, int64_t total_stride) {
  constexpr int64_t kAtOnce = 4;
  for (int64_t step = 0; step < problem.steps; step += kAtOnce) {
    switch (least(kAtOnce, problem.steps - step)) {
      case 1: add_steps<1>(rows, problem.dim, total, total_stride); break;
      case 2: add_steps<2>(rows, problem.dim, total, total_stride); break;
      case 3: add_steps<3>(rows, problem.dim, total, total_stride); break;
      default: add_steps<4>(rows, problem.dim, total, total_stride);
    }
    rows.ahead = 0;
    rows.weights += kAtOnce * rows.weight_stride_step;
    if (rows.gates) rows.gates += kAtOnce * rows.gate_stride_step;
    total += kAtOnce * total_stride;
  }
}

template <class T, class Snapshot>
void add_layers(const TaylorProblem& problem, const Snapshot* snapshots, int64_t batch, int64_t token, T* total,
                int64_t total_stride) {
  const auto* gates = static_cast<const Snapshot*>(problem.gates);
  for (int64_t layer = 0; layer < problem.layers; ++layer) {
    LayerRows<Snapshot> rows{};
    rows.first = snapshots + layer * problem.snapshot_stride_layer + batch * problem.snapshot_stride_batch +
                 token * problem.snapshot_stride_token;
    rows.slots = problem.slots, rows.stride = problem.snapshot_stride_slot;
    rows.weights = problem.weights + layer * problem.weight_stride_layer;
    rows.weight_stride = problem.weight_stride_slot, rows.weight_stride_step = problem.weight_stride_step;
    if (gates) rows.gates = gates + layer * problem.gate_stride_layer + batch * problem.gate_stride_batch;
    rows.gate_stride_step = problem.gate_stride_step;
    rows.ahead = problem.layers > 1 ? problem.snapshot_stride_token : 0;
    add_layer(problem, rows, total, total_stride);
  }
}

// `total` holds a row of whole vectors for every step.
template <class T>
void extrapolate_token(const TaylorProblem& problem, int64_t batch, int64_t token, T* total) {
  const int64_t dim = problem.dim, total_stride = round_up(dim, kLanes<T>);
  for (int64_t step = 0; step < problem.steps; ++step) {
    T* row = total + step * total_stride;
    if (problem.residual) {
      with_elements(problem.residual, problem.out_type, [&](auto* residual) {
        read_row(residual + batch * problem.residual_stride_batch + token * problem.residual_stride_token, dim, row);
      });
    } else {
      for (int64_t d = 0; d < total_stride; ++d) row[d] = 0;
    }
  }
  with_elements(problem.snapshots, problem.snapshot_type,
                [&](auto* snapshots) { add_layers(problem, snapshots, batch, token, total, total_stride); });
  with_elements(problem.out, problem.out_type, [&](auto* out) {
    for (int64_t step = 0; step < problem.steps; ++step) {
      write_row(total + step * total_stride, dim, out + ((step * problem.batch + batch) * problem.tokens + token) * dim);
    }
  });
}

template <class T>
void extrapolate(const TaylorProblem& problem, int64_t begin, int64_t end, void* memory) {
  T* total = Scratch(memory).take<T>(problem.steps * round_up(problem.dim, kLanes<T>));
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
