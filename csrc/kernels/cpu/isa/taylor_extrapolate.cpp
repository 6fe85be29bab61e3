// taylor_extrapolate, a token at a time: every snapshot row with a weight is read once, whatever the number of steps, and
// the results written once, with the sums over layers kept in the first-level cache. Memory sets the speed.
#include "convert.h"
#include "kernels.h"
#include "scratch.h"

namespace haste::cpu::HASTE_ISA {
namespace {

constexpr int64_t kAtOnce = 4;  // steps whose sums are in registers together

HASTE_INLINE int64_t groups_of(const TaylorProblem& problem) { return (problem.steps + kAtOnce - 1) / kAtOnce; }

// Which slots of each layer have a weight at some step, and their weights, `kAtOnce` steps together.
template <class T>
struct Plan {
  int64_t* used;     // (layers): how many
  int64_t* offsets;  // (layers, slots): in elements, of the used ones
  T* weights;        // (layers, groups, slots, kAtOnce), of the used ones
  bool* guarded;     // (layers, groups): a used slot has weight 0 at a step of the group, and must not add even a NaN

  Plan(const TaylorProblem& problem, Scratch& scratch)
      : used(scratch.take<int64_t>(problem.layers)),
        offsets(scratch.take<int64_t>(problem.layers * problem.slots)),
        weights(scratch.take<T>(problem.layers * groups_of(problem) * problem.slots * kAtOnce)),
        guarded(scratch.take<bool>(problem.layers * groups_of(problem))) {}

  void fill(const TaylorProblem& problem) {
    for (int64_t layer = 0; layer < problem.layers; ++layer) fill_layer(problem, layer);
  }

 private:
  void fill_layer(const TaylorProblem& problem, int64_t layer) {
    const int64_t groups = groups_of(problem);
    used[layer] = 0;
    for (int64_t group = 0; group < groups; ++group) guarded[layer * groups + group] = false;
    for (int64_t slot = 0; slot < problem.slots; ++slot) {
      const auto weight = [&](int64_t step) {
        return problem.weights[step * problem.weight_stride_step + layer * problem.weight_stride_layer +
                               slot * problem.weight_stride_slot];
      };
      bool wanted = false;
      for (int64_t step = 0; step < problem.steps; ++step) wanted |= weight(step) != 0;
      if (!wanted) continue;
      const int64_t k = used[layer]++;
      offsets[layer * problem.slots + k] = layer * problem.snapshot_stride_layer + slot * problem.snapshot_stride_slot;
      for (int64_t step = 0; step < problem.steps; ++step) {
        const int64_t group = layer * groups + step / kAtOnce;
        weights[(group * problem.slots + k) * kAtOnce + step % kAtOnce] = weight(step);
        guarded[group] |= weight(step) == 0;
      }
    }
  }
};

// The many rows of several layers are too many and too short for the processor to read ahead by itself.
template <int Count, class Snapshot>
HASTE_INLINE void prefetch(const Snapshot* row) {
  for (int d = 0; d < Count; d += 64 / int(sizeof(Snapshot))) __builtin_prefetch(row + d, 0, 2);
}

// One layer of one token: its used snapshots, and their weights and the gates at a few steps.
template <class T, class Snapshot>
struct LayerRows {
  const Snapshot* token;
  const int64_t* offsets;
  int64_t slots;
  const T* weights;
  const Snapshot* gates;  // null: 1
  int64_t gate_stride_step;
  int64_t ahead;  // to what is read next of the same snapshots

  // total_s[d …] += gate_s · Σ_k w_{s,k} · snapshot_k, `Vectors` vectors from element d on.
  template <int Steps, int Vectors, bool Guarded, class Load>
  HASTE_INLINE void add_vectors(int64_t d, const Load& load_lanes, T* total, int64_t total_stride) const {
    Vector<T> sum[Steps][Vectors];
    for (int s = 0; s < Steps; ++s) {
      for (int v = 0; v < Vectors; ++v) sum[s][v] = Vector<T>{};
    }
    for (int64_t k = 0; k < slots; ++k) {
      const Snapshot* row = token + offsets[k] + d;
      if (ahead) prefetch<Vectors * kLanes<T>>(row + ahead);
      Vector<T> lanes[Vectors];
      for (int v = 0; v < Vectors; ++v) lanes[v] = load_lanes(row + v * kLanes<T>);
      for (int s = 0; s < Steps; ++s) {
        const T weight = weights[k * kAtOnce + s];
        if (Guarded && weight == 0) continue;
        for (int v = 0; v < Vectors; ++v) sum[s][v] += weight * lanes[v];
      }
    }
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
template <int Steps, bool Guarded, class T, class Snapshot>
void add_steps(const LayerRows<T, Snapshot>& rows, int64_t dim, T* total, int64_t stride) {
  constexpr int L = kLanes<T>;
  constexpr int kMost = Steps * 4 <= kVectorRegisters / 2 ? 4 : 2;  // vectors whose sums are kept in registers
  const auto whole = [](const Snapshot* from) { return load_as<T>(from); };
  int64_t d = 0;
  for (; d + kMost * L <= dim; d += kMost * L) {
    rows.template add_vectors<Steps, kMost, Guarded>(d, whole, total, stride);
  }
  for (; d + 2 * L <= dim; d += 2 * L) rows.template add_vectors<Steps, 2, Guarded>(d, whole, total, stride);
  for (; d + L <= dim; d += L) rows.template add_vectors<Steps, 1, Guarded>(d, whole, total, stride);
  if (d < dim) {
    const int64_t count = dim - d;
    const auto some = [count](const Snapshot* from) { return load_first<T>(from, count); };
    rows.template add_vectors<Steps, 1, Guarded>(d, some, total, stride);
  }
}

template <bool Guarded, class T, class Snapshot>
void add_group(const LayerRows<T, Snapshot>& rows, int64_t steps, int64_t dim, T* total, int64_t stride) {
  switch (steps) {
    case 1: return add_steps<1, Guarded>(rows, dim, total, stride);
    case 2: return add_steps<2, Guarded>(rows, dim, total, stride);
    case 3: return add_steps<3, Guarded>(rows, dim, total, stride);
    default: return add_steps<4, Guarded>(rows, dim, total, stride);
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

// All steps of one layer; after the first few the snapshots are found in the cache.
template <class T, class Snapshot>
void add_layer(const TaylorProblem& problem, const Plan<T>& plan, const Snapshot* snapshots, int64_t layer,
               int64_t batch, int64_t token, T* total, int64_t total_stride) {
  const auto* gates = static_cast<const Snapshot*>(problem.gates);
  LayerRows<T, Snapshot> rows{};
  rows.token = snapshots + batch * problem.snapshot_stride_batch + token * problem.snapshot_stride_token;
  rows.offsets = plan.offsets + layer * problem.slots, rows.slots = plan.used[layer];
  rows.gate_stride_step = problem.gate_stride_step;
  rows.ahead = problem.layers > 1 ? problem.snapshot_stride_token : 0;
  for (int64_t step = 0; step < problem.steps; step += kAtOnce) {
    const int64_t group = layer * groups_of(problem) + step / kAtOnce, steps = least(kAtOnce, problem.steps - step);
    rows.weights = plan.weights + group * problem.slots * kAtOnce;
    if (gates) {
      rows.gates = gates + step * problem.gate_stride_step + layer * problem.gate_stride_layer +
                   batch * problem.gate_stride_batch;
    }
    T* to = total + step * total_stride;
    plan.guarded[group] ? add_group<true>(rows, steps, problem.dim, to, total_stride)
                        : add_group<false>(rows, steps, problem.dim, to, total_stride);
    rows.ahead = 0;
  }
}

// `total` holds a row of whole vectors for every step.
template <class T>
void extrapolate_token(const TaylorProblem& problem, const Plan<T>& plan, int64_t batch, int64_t token, T* total) {
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
  with_elements(problem.snapshots, problem.snapshot_type, [&](auto* snapshots) {
    for (int64_t layer = 0; layer < problem.layers; ++layer) {
      add_layer(problem, plan, snapshots, layer, batch, token, total, total_stride);
    }
  });
  with_elements(problem.out, problem.out_type, [&](auto* out) {
    for (int64_t step = 0; step < problem.steps; ++step) {
      write_row(total + step * total_stride, dim,
                out + ((step * problem.batch + batch) * problem.tokens + token) * dim);
    }
  });
}

// What a thread needs: cut out of `scratch`, which may be one that only counts.
template <class T>
struct Workspace {
  Plan<T> plan;
  T* total;

  Workspace(const TaylorProblem& problem, Scratch& scratch)
      : plan(problem, scratch), total(scratch.take<T>(problem.steps * round_up(problem.dim, kLanes<T>))) {}
};

template <class T>
void extrapolate(const TaylorProblem& problem, int64_t begin, int64_t end, void* memory) {
  Scratch scratch(memory);
  Workspace<T> work(problem, scratch);
  work.plan.fill(problem);
  for (int64_t row = begin; row < end; ++row) {
    extrapolate_token(problem, work.plan, row / problem.tokens, row % problem.tokens, work.total);
  }
}

template <class T>
size_t scratch_bytes(const TaylorProblem& problem) {
  Scratch counter(nullptr);
  Workspace<T>(problem, counter);
  return counter.used();
}

}  // namespace

template <class T>
TaylorKernels taylor_extrapolate() {
  return {scratch_bytes<T>, extrapolate<T>};
}
template TaylorKernels taylor_extrapolate<HASTE_COMPUTE>();

}  // namespace haste::cpu::HASTE_ISA
