// taylor_extrapolate: every snapshot is read once for all steps, the results written once; bound by memory alone.
//
// A thread owns 16 bytes of neighbouring channels of one token, and walks through the layers. So that many 16-byte loads are under
// way at once, it fetches all slots of a layer together, and those of the next layer before it adds up this one's.
// The weights lie in device memory, so that one CUDA graph serves every step; each block keeps a copy in shared memory.
#include "../taylor_extrapolate.h"

#include <algorithm>

#include "element_type.cuh"
#include "vector.cuh"

namespace haste::cuda {
namespace {

constexpr int kBlockThreads = 128;
constexpr int kMostSteps = 8;               // of one launch; their sums stay in registers
constexpr int64_t kStageBytes = 16 * 1024;  // in shared memory at a time
constexpr int64_t kLargestGridY = 65535;

// Blocks of which a multiprocessor must have room for, so that the compiler takes no more registers than that leaves.
template <int kSteps>
constexpr int kBlocks = kSteps == 1   ? 5
                        : kSteps <= 4 ? 3
                                      : 2;

template <typename T>
constexpr int kChannels = 16 / sizeof(T);  // of one thread

struct Arguments {
  TaylorProblem problem;
  int vectors_per_token, vectors;  // threads' worth of channels in a token, in one batch entry
  int groups;                      // of slots in a layer: slots beyond a kernel's own number are fetched by turns
  int stages_at_once;              // whose weights fit into shared memory
  bool residual_aligned, out_aligned;
};

// A thread's channels as they lie in memory.
template <typename T>
struct Packed {
  uint4 words;

  // `aligned`: 16-byte aligned and whole; else the first `count` elements, and zeros. What is not wanted stays.
  template <bool kAligned, bool kOnce>
  __device__ void load(const T* source, int count, bool wanted) {
    if constexpr (kAligned) {
      kOnce ? load_16_once(words, source, wanted) : load_16(words, source, wanted);
    } else if (wanted) {
      auto& elements = reinterpret_cast<Vector<T, kChannels<T>>&>(words).elements;
#pragma unroll
      for (int i = 0; i < kChannels<T>; ++i) elements[i] = i < count ? source[i] : from_float<T>(0.f);
    }
  }

  __device__ void unpack(float (&values)[kChannels<T>]) const {
    const auto& elements = reinterpret_cast<const Vector<T, kChannels<T>>&>(words).elements;
#pragma unroll
    for (int i = 0; i < kChannels<T>; ++i) values[i] = to_float(elements[i]);
  }
};

// Some slots of one layer, which a thread fetches together.
struct Stage {
  int64_t snapshots, gates;  // how far into them
  unsigned used;             // a bit for every slot that has a weight at some step
};

// The stages in shared memory, as many as fit.
template <int kSteps, int kSlots>
struct Stages {
  const TaylorProblem& p;
  int groups, count;
  Stage* stages;
  float* weights;  // (stages, slots, steps), 0 for slots and steps that are not there

  static constexpr int64_t kBytes = sizeof(Stage) + kSlots * kSteps * sizeof(float);  // of one

  __device__ explicit Stages(const Arguments& arguments)
      : p(arguments.problem),
        groups(arguments.groups),
        count(static_cast<int>(p.layers) * groups),
        stages(static_cast<Stage*>(dynamic_shared_memory())),
        weights(reinterpret_cast<float*>(stages + arguments.stages_at_once)) {}

  __device__ float weight(int stage, int k, int s) const {
    const int64_t layer = stage / groups, slot = stage % groups * kSlots + k;
    if (slot >= p.slots || s >= p.steps) return 0.f;
    return p.weights[s * p.weight_stride_step + layer * p.weight_stride_layer + slot * p.weight_stride_slot];
  }

  // The whole block brings the stages [first, end).
  __device__ void prepare(int first, int end) const {
    __syncthreads();
    for (int i = threadIdx.x; i < end - first; i += kBlockThreads) {
      const int64_t layer = (first + i) / groups, slot = (first + i) % groups * kSlots;
      stages[i] = {layer * p.snapshot_stride_layer + slot * p.snapshot_stride_slot, layer * p.gate_stride_layer, 0};
#pragma unroll 1
      for (int j = 0; j < kSlots * kSteps; ++j) {
        const float w = weight(first + i, j / kSteps, j % kSteps);
        weights[i * kSlots * kSteps + j] = w;
        if (w != 0.f) stages[i].used |= 1u << j / kSteps;
      }
    }
    __syncthreads();
  }
};

// What one thread adds up: `kSteps` sums of its channels of one token.
template <typename T, int kSteps, int kSlots, bool kAligned>
struct Worker {
  using Slots = Packed<T>[kSlots];
  static constexpr int kSets =
      kSlots >= 3 ? 2 : 5;  // of slots in registers: one is added up, the others are on their way
  static constexpr int kTogether = kSteps < 4 ? kSteps : 4;  // steps whose gates and sums are in registers

  const Stages<kSteps, kSlots>& all;
  const T* snapshots;  // at this thread's channels
  const T* gates;      // the same; null: 1
  int count;           // of channels
  float (&total)[kSteps][kChannels<T>];

  __device__ void fetch(Slots& slots, int stage, int stages) const {
    const unsigned used = stage < stages ? all.stages[stage].used : 0;
    const T* source = snapshots + (stage < stages ? all.stages[stage].snapshots : 0);
#pragma unroll
    for (int k = 0; k < kSlots; ++k) {
      slots[k].template load<kAligned, true>(source + k * all.p.snapshot_stride_slot, count, used >> k & 1);
    }
  }

  __device__ void fetch_gates(Packed<T> (&gate)[kTogether], int stage, int step) const {
    const T* source = gates + all.stages[stage].gates + step * all.p.gate_stride_step;
#pragma unroll
    for (int s = 0; s < kTogether; ++s) {
      gate[s].template load<kAligned, false>(source + s * all.p.gate_stride_step, count,
                                             gates != nullptr && step + s < all.p.steps);
    }
  }

  // Steps from `step` on. A slot of weight 0 was perhaps not read, or holds what must not come in.
  __device__ void add(const Slots& slots, const Packed<T> (&gate)[kTogether], int stage, int step) const {
    float sum[kTogether][kChannels<T>] = {}, values[kChannels<T>];
#pragma unroll
    for (int k = 0; k < kSlots; ++k) {
      const float* weights = all.weights + (stage * kSlots + k) * kSteps + step;
      slots[k].unpack(values);
#pragma unroll
      for (int s = 0; s < kTogether; ++s) add_if_weighted(sum[s], values, weights[s]);
    }
#pragma unroll
    for (int s = 0; s < kTogether; ++s) {
      gate[s].unpack(values);
#pragma unroll
      for (int i = 0; i < kChannels<T>; ++i) {
        total[step + s][i] = fmaf(gates != nullptr ? values[i] : 1.f, sum[s][i], total[step + s][i]);
      }
    }
  }

  // The stages that lie in shared memory.
  __device__ void add_stages(int stages) const {
    Slots sets[kSets] = {};
#pragma unroll
    for (int i = 0; i < kSets - 1; ++i) fetch(sets[i], i, stages);
    for (int first = 0; first < stages; first += kSets) {
#pragma unroll
      for (int i = 0; i < kSets; ++i) {
        const int stage = first + i;
        if (stage >= stages) break;
#pragma unroll
        for (int step = 0; step < kSteps; step += kTogether) {
          Packed<T> gate[kTogether] = {};
          fetch_gates(gate, stage, step);
          if (step == 0) fetch(sets[(i + kSets - 1) % kSets], stage + kSets - 1, stages);
          add(sets[i], gate, stage, step);
        }
      }
    }
  }
};

// Calls run(Out{}) for the element type Out: of several steps always the snapshots' own.
template <typename T, int kSteps, typename Run>
__device__ void with_out_type(ScalarType type, const Run& run) {
  if constexpr (kSteps > 1) {
    run(T{});
  } else {
    switch (type) {
      case ScalarType::Float16: return run(__half{});
      case ScalarType::BFloat16: return run(__nv_bfloat16{});
      default: return run(float{});
    }
  }
}

template <typename T, int kSteps, int kSlots, bool kAligned>
__global__ void __launch_bounds__(kBlockThreads, kBlocks<kSteps>) extrapolate_kernel(Arguments arguments) {
  const TaylorProblem& p = arguments.problem;
  const Stages<kSteps, kSlots> stages(arguments);
  const int64_t vector = static_cast<int64_t>(blockIdx.x) * kBlockThreads + threadIdx.x;
  const bool inside = vector < arguments.vectors;  // the others only help with the weights
  const int token = static_cast<int>(vector) / arguments.vectors_per_token;
  const int channel = static_cast<int>(vector) % arguments.vectors_per_token * kChannels<T>;
  const int count = static_cast<int>(p.dim) - channel;

  for (int64_t batch = blockIdx.y; batch < p.batch; batch += gridDim.y) {
    float total[kSteps][kChannels<T>] = {};
    const T* gates = static_cast<const T*>(p.gates);
    const Worker<T, kSteps, kSlots, kAligned> worker{
        stages,
        static_cast<const T*>(p.snapshots) + batch * p.snapshot_stride_batch + token * p.snapshot_stride_token +
            channel,
        gates == nullptr ? nullptr : gates + batch * p.gate_stride_batch + channel, count, total};
    for (int first = 0; first < stages.count; first += arguments.stages_at_once) {
      const int end = min(stages.count, first + arguments.stages_at_once);
      if (batch == blockIdx.y || stages.count > arguments.stages_at_once) stages.prepare(first, end);
      if (inside) worker.add_stages(end - first);
    }
    if (!inside) continue;
    with_out_type<T, kSteps>(p.out_type, [&](auto type) {
      using Out = decltype(type);
      if (kSteps == 1 && p.residual != nullptr) {
        float residual[kChannels<T>];
        load(residual,
             static_cast<const Out*>(p.residual) + batch * p.residual_stride_batch + token * p.residual_stride_token +
                 channel,
             count, arguments.residual_aligned);
#pragma unroll
        for (int i = 0; i < kChannels<T>; ++i) total[0][i] += residual[i];
      }
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        if (s >= p.steps) break;
        Out* out = static_cast<Out*>(p.out) + ((s * p.batch + batch) * p.tokens + token) * p.dim + channel;
        store(out, total[s], count, arguments.out_aligned);
      }
    });
  }
}

template <typename T, int kSteps, int kSlots, bool kAligned>
const char* launch_extrapolate(Arguments arguments, void* stream) {
  using TheStages = Stages<kSteps, kSlots>;
  const TaylorProblem& p = arguments.problem;
  const int64_t groups = ceil_div(p.slots, kSlots);
  if (!fits_int(p.layers * groups)) return "taylor_extrapolate on CUDA takes fewer than 2^31 layers times slots";
  arguments.groups = static_cast<int>(groups);
  arguments.stages_at_once = static_cast<int>(std::min(p.layers * groups, kStageBytes / TheStages::kBytes));
  const dim3 grid(static_cast<unsigned>(ceil_div(arguments.vectors, kBlockThreads)),
                  static_cast<unsigned>(std::min(p.batch, kLargestGridY)));
  return launch(extrapolate_kernel<T, kSteps, kSlots, kAligned>, grid, kBlockThreads,
                arguments.stages_at_once * TheStages::kBytes, stream, arguments);
}

template <typename T, int kSteps>
const char* launch_steps(const Arguments& arguments, bool aligned, void* stream) {
  const int64_t slots = arguments.problem.slots;
  if (!aligned) return launch_extrapolate<T, kSteps, 3, false>(arguments, stream);
  if (slots <= 1) return launch_extrapolate<T, kSteps, 1, true>(arguments, stream);
  if (slots <= 3) return launch_extrapolate<T, kSteps, 3, true>(arguments, stream);
  return launch_extrapolate<T, kSteps, 5, true>(arguments, stream);
}

// `p.steps` steps in one pass over the snapshots.
template <typename T>
const char* launch_pass(const TaylorProblem& p, void* stream) {
  const int64_t size = sizeof(T), out_size = p.out_type == ScalarType::Float32 ? 4 : 2;
  const int64_t vectors_per_token = ceil_div(p.dim, kChannels<T>);
  const int64_t vectors = p.tokens * vectors_per_token;
  if (!fits_int(vectors) || !fits_int(p.dim)) {
    return "taylor_extrapolate on CUDA takes fewer than 2^31 times 16 bytes per batch entry of a snapshot";
  }
  const bool whole = p.dim % kVector == 0;  // of every type
  Arguments arguments{p, static_cast<int>(vectors_per_token), static_cast<int>(vectors), 1, 1, false, false};
  arguments.residual_aligned = whole && aligned_16(p.residual) &&
                               stride_aligned_16(p.batch, p.residual_stride_batch, out_size) &&
                               stride_aligned_16(p.tokens, p.residual_stride_token, out_size);
  arguments.out_aligned = whole && aligned_16(p.out);
  const bool aligned = whole && aligned_16(p.snapshots) && stride_aligned_16(p.layers, p.snapshot_stride_layer, size) &&
                       stride_aligned_16(p.slots, p.snapshot_stride_slot, size) &&
                       stride_aligned_16(p.batch, p.snapshot_stride_batch, size) &&
                       stride_aligned_16(p.tokens, p.snapshot_stride_token, size) && aligned_16(p.gates) &&
                       stride_aligned_16(p.steps, p.gate_stride_step, size) &&
                       stride_aligned_16(p.layers, p.gate_stride_layer, size) &&
                       stride_aligned_16(p.batch, p.gate_stride_batch, size);
  if (p.steps == 1) return launch_steps<T, 1>(arguments, aligned, stream);
  if (p.steps <= 4) return launch_steps<T, 4>(arguments, aligned, stream);
  return launch_steps<T, kMostSteps>(arguments, aligned, stream);
}

// In as few passes as there must be, of about as many steps each.
template <typename T>
const char* launch_passes(const TaylorProblem& problem, void* stream) {
  const int64_t per_pass = ceil_div(problem.steps, ceil_div(problem.steps, kMostSteps));
  for (int64_t step = 0; step < problem.steps; step += per_pass) {
    TaylorProblem p = problem;
    p.steps = std::min(per_pass, problem.steps - step);
    p.weights += step * p.weight_stride_step;
    if (p.gates != nullptr) p.gates = static_cast<const T*>(p.gates) + step * p.gate_stride_step;
    if (problem.steps > 1) p.out = static_cast<T*>(p.out) + step * p.batch * p.tokens * p.dim;
    if (const char* error = launch_pass<T>(p, stream)) return error;
  }
  return nullptr;
}

}  // namespace

const char* taylor_extrapolate(const TaylorProblem& problem, void* stream) {
  if (problem.steps == 0 || problem.batch == 0 || problem.tokens == 0 || problem.dim == 0) return nullptr;
  if (problem.steps > 1 && (problem.out_type != problem.snapshot_type || problem.residual != nullptr)) {
    return "taylor_extrapolate on CUDA makes several steps of the snapshots' type, and without a residual";
  }
  const char* error = dispatch_type(problem.out_type, [](auto) -> const char* { return nullptr; });
  if (error != nullptr) return error;
  return dispatch_type(problem.snapshot_type,
                       [&](auto snapshot) { return launch_passes<decltype(snapshot)>(problem, stream); });
}

}  // namespace haste::cuda
