// Small kernels on the primitives of arch_hopper.cuh: one for each of them, then a ring of stages and a relay of two
// warpgroups as the kernels proper have them, also with one fault each, of a kind that a GPU would not report.
#include "hopper_primitives.h"

#include <kernels/cuda/arch_hopper.cuh>
#include <kernels/cuda/launch.cuh>

#include <algorithm>
#include <iterator>

namespace haste::cuda {
namespace {

constexpr int kRows = 64;  // of a tile, of a warpgroup's product
constexpr int kStep = 16;  // the contraction of one wgmma
constexpr int kMostColumns = 128;
constexpr int kMostSteps = 8;
constexpr int kBarrierBytes = 1024;  // ahead of the panels

char* panels() { return static_cast<char*>(panel_memory()) + kBarrierBytes; }
Barrier* barriers() { return static_cast<Barrier*>(panel_memory()); }
constexpr int panel_bytes(int rows) { return rows * static_cast<int>(kPanelRowBytes); }

// --- a panel ---

__global__ void panel_kernel(const __grid_constant__ TensorMap map, PanelProblem p, uint16_t* panel) {
  if (threadIdx.x == 0) {
    prefetch(map);
    barrier_init(barriers(), 1);
    barrier_init_fence();
    barrier_arrive_and_expect(barriers(), panel_bytes(p.rows));
    load_panel(panels(), map, barriers(), p.column, p.token, p.head, p.sample);
  }
  __syncthreads();
  barrier_wait(barriers(), 0);
  const auto* loaded = reinterpret_cast<const uint16_t*>(panels());
  for (int i = threadIdx.x; i < p.rows * kPanelColumns; i += kWarpSize) panel[i] = loaded[i];
}

// --- a product ---

struct Shape {
  int columns, depth;
  bool transpose_a, transpose_b, load_a, a_in_registers;
  bool fence_stores, change_registers;  // without and with: faults
  int a_rows() const { return transpose_a ? depth : kRows; }
  int b_rows() const { return transpose_b ? depth : columns; }
  int a_panels() const { return static_cast<int>(ceil_div(transpose_a ? kRows : depth, kPanelColumns)); }
  int b_panels() const { return static_cast<int>(ceil_div(transpose_b ? columns : depth, kPanelColumns)); }
  int a_bytes() const { return a_panels() * panel_bytes(a_rows()); }
  int b_bytes() const { return b_panels() * panel_bytes(b_rows()); }
};

void load_panels(char* target, const TensorMap& map, int panels, int rows) {
  for (int i = 0; i < panels; ++i) {
    load_panel(target + i * panel_bytes(rows), map, barriers(), i * kPanelColumns, 0, 0, 0);
  }
}

// Where columns from `step` on of the contraction begin.
uint64_t operand_descriptor(const char* operand, int rows, bool transposed, int step) {
  if (transposed) return columns_descriptor(operand + step * kStep * kPanelRowBytes, panel_bytes(rows));
  constexpr int kSteps = kPanelColumns / kStep;
  return rows_descriptor(operand + step / kSteps * panel_bytes(rows) + step % kSteps * kStep * 2);
}

// A fragment of A from memory.
template <typename T>
void read_fragment(const T* a, const Shape& shape, int step, uint32_t (&fragment)[4]) {
  const int lane = threadIdx.x % kWarpSize;
  for (int i = 0; i < 4; ++i) {
    float pair[2];
    for (int j = 0; j < 2; ++j) {
      const int row = threadIdx.x / kWarpSize * kStep + lane / 4 + i % 2 * 8;
      const int k = step * kStep + lane % 4 * 2 + i / 2 * 8 + j;
      pair[j] = to_float(shape.transpose_a ? a[k * kRows + row] : a[row * shape.depth + k]);
    }
    fragment[i] = pack<T>(pair[0], pair[1]);
  }
}

void store_fragment(char* operand, const Shape& shape, int step, const uint32_t (&fragment)[4]) {
  const int lane = threadIdx.x % kWarpSize, matrix = lane / 8;
  const int row = threadIdx.x / kWarpSize * kStep + matrix % 2 * 8, k = step * kStep + matrix / 2 * 8;
  if (shape.transpose_a) {
    store_matrices_transposed(operand + panel_offset(k + lane % 8, row), fragment);
  } else {
    store_matrices(operand + k / kPanelColumns * panel_bytes(kRows) + panel_offset(row + lane % 8, k % kPanelColumns),
                   fragment);
  }
}

using Accumulators = float[kMostColumns / 8][4];

// The one instruction of this shape.
template <typename T, int kColumns, bool kTransposeA, bool kTransposeB>
void issue(const Shape& shape, Accumulators& c, const uint32_t (&a)[4], uint64_t a_desc, uint64_t b_desc, bool add) {
  auto& cells = reinterpret_cast<float (&)[kColumns / 8][4]>(c);
  if (shape.a_in_registers) return wgmma<T, kColumns, kTransposeB>(cells, a, b_desc, add);
  wgmma<T, kColumns, kTransposeA, kTransposeB>(cells, a_desc, b_desc, add);
}

template <typename T, int kColumns = 8, typename... Rest>
void issue_any(const Shape& shape, Rest&&... rest) {
  if (shape.columns != kColumns) {
    if constexpr (kColumns < kMostColumns) issue_any<T, kColumns + 8>(shape, rest...);
  } else if (shape.transpose_a && shape.transpose_b) {
    issue<T, kColumns, true, true>(shape, rest...);
  } else if (shape.transpose_a) {
    issue<T, kColumns, true, false>(shape, rest...);
  } else if (shape.transpose_b) {
    issue<T, kColumns, false, true>(shape, rest...);
  } else {
    issue<T, kColumns, false, false>(shape, rest...);
  }
}

template <typename T>
__global__ void product_kernel(const __grid_constant__ TensorMap a_map, const __grid_constant__ TensorMap b_map,
                               Shape shape, const T* a, float* c) {
  char *a_panels = panels(), *b_panels = panels() + shape.a_bytes();
  if (threadIdx.x == 0) {
    barrier_init(barriers(), 1);
    barrier_init_fence();
    barrier_arrive_and_expect(barriers(), shape.b_bytes() + (shape.load_a ? shape.a_bytes() : 0));
    if (shape.load_a) load_panels(a_panels, a_map, shape.a_panels(), shape.a_rows());
    load_panels(b_panels, b_map, shape.b_panels(), shape.b_rows());
  }
  const int steps = shape.depth / kStep;
  uint32_t fragments[kMostSteps][4];
  for (int step = 0; step < steps; ++step) {
    read_fragment(a, shape, step, fragments[step]);
    if (!shape.load_a && !shape.a_in_registers) store_fragment(a_panels, shape, step, fragments[step]);
  }
  if (shape.fence_stores) fence_shared_for_async();
  __syncthreads();
  barrier_wait(barriers(), 0);

  Accumulators cells;
  fence_registers(cells);
  wgmma_fence();
  for (int step = 0; step < steps; ++step) {
    issue_any<T>(shape, cells, fragments[step], operand_descriptor(a_panels, shape.a_rows(), shape.transpose_a, step),
                 operand_descriptor(b_panels, shape.b_rows(), shape.transpose_b, step), step > 0);
  }
  wgmma_commit();
  if (shape.change_registers) fragments[0][0] = 0;
  wgmma_wait<0>();
  fence_registers(cells);
  const int lane = threadIdx.x % kWarpSize, row = threadIdx.x / kWarpSize * kStep + lane / 4;
  for (int i = 0; i < shape.columns / 8; ++i) {
    for (int j = 0; j < 4; ++j) c[(row + j / 2 * 8) * shape.columns + 8 * i + lane % 4 * 2 + j % 2] = cells[i][j];
  }
}

// --- a ring of stages ---

enum class Fault {
  kNone,
  kReadBeforeFull,     // the warpgroup does not wait for the copy engine
  kReadBeforeWait,     // the accumulators are read before wgmma_wait
  kReleaseBeforeWait,  // a stage is given back while its product is under way
  kReleaseForOthers,   // a stage is given back by one warp for all four
  kTooManyBytes,       // the barrier expects more than arrives
  kTooFewBytes,        // and less
  kNoProducer,         // nobody arrives
  kArrivesTwice,
  kOverwritten,  // a thread writes over a barrier
  kNoWgmmaFence,
  kNoCommit,
  kNoInitFence,
  kNoInit,
  kMisalignedPanel,
  kWrongSwizzle,         // the descriptor says 64 bytes
  kWrongStride,          // the descriptor takes 4 rows for 8
  kWrongMajor,           // the contraction runs along the other dimension
  kTouchedAccumulators,  // a thread writes one while the product is under way
  kStoresUnfenced,       // a stage is written before it goes back, without a fence
  kUnevenWarps,          // one warp names another operand
  kDivergedWarp,         // one lane stays away
};
constexpr const char* kFaultNames[] = {
    "none",
    "read before full",
    "read before wait",
    "release before wait",
    "release for others",
    "too many bytes",
    "too few bytes",
    "no producer",
    "arrives twice",
    "overwritten",
    "no wgmma_fence",
    "no commit",
    "no init fence",
    "no init",
    "misaligned",
    "wrong swizzle",
    "wrong stride",
    "wrong major",
    "touched",
    "stores unfenced",
    "uneven warps",
    "diverged warp",
};

constexpr int kStages = 2;
constexpr int kRingThreads = kWarpgroupSize + kWarpSize;

void produce(const TensorMap& a_map, const TensorMap& b_map, int tiles, Fault fault) {
  Barrier *full = barriers(), *empty = full + kStages, *a_full = empty + kStages;
  const int shift = fault == Fault::kMisalignedPanel ? 128 : 0;
  const int bytes = panel_bytes(kRows) + (fault == Fault::kTooManyBytes ? 16 : fault == Fault::kTooFewBytes ? -16 : 0);
  barrier_arrive_and_expect(a_full, panel_bytes(kRows));
  load_panel(panels(), a_map, a_full, 0, 0, 0, 0);
  for (int tile = 0; tile < tiles; ++tile) {
    const int stage = tile % kStages, round = tile / kStages;
    barrier_wait(empty + stage, (round + 1) & 1);  // at once in round 0
    barrier_arrive_and_expect(full + stage, bytes);
    if (fault == Fault::kArrivesTwice) barrier_arrive(full + stage);
    if (fault == Fault::kOverwritten) full[stage] = 0;
    load_panel(panels() + (1 + stage) * panel_bytes(kRows) + shift, b_map, full + stage, 0, tile * kRows, 0, 0);
  }
}

void release(Barrier* empty, Fault fault) {
  const bool speaks = threadIdx.x % kWarpSize == 0 && (fault != Fault::kReleaseForOthers || threadIdx.x == 0);
  if (speaks) barrier_arrive(empty);
}

uint64_t faulty(uint64_t descriptor, Fault fault) {
  if (fault == Fault::kWrongSwizzle) return descriptor ^ uint64_t{3} << 62;
  if (fault == Fault::kWrongStride) return descriptor - (uint64_t{32} << 32);
  if (fault == Fault::kUnevenWarps && threadIdx.x / kWarpSize == 3) return descriptor + 2;
  return descriptor;
}

void consume(int tiles, Fault fault, float* c) {
  Barrier *full = barriers(), *empty = full + kStages, *a_full = empty + kStages;
  float cells[kRows / 8][4];
  barrier_wait(a_full, 0);
  for (int tile = 0; tile < tiles; ++tile) {
    const int stage = tile % kStages, round = tile / kStages;
    const char* b = panels() + (1 + stage) * panel_bytes(kRows);
    if (fault != Fault::kReadBeforeFull) barrier_wait(full + stage, round & 1);
    fence_registers(cells);
    if (fault != Fault::kNoWgmmaFence) wgmma_fence();
    if (fault == Fault::kDivergedWarp && threadIdx.x == 5) return;
    for (int step = 0; step < kRows / kStep; ++step) {
      const uint64_t a_desc = rows_descriptor(panels() + step * kStep * 2);
      const uint64_t b_desc = faulty(rows_descriptor(b + step * kStep * 2), fault);
      if (fault == Fault::kWrongMajor) {
        wgmma<__half, kRows, false, true>(cells, a_desc, b_desc, tile + step > 0);
      } else {
        wgmma<__half, kRows, false, false>(cells, a_desc, b_desc, tile + step > 0);
      }
    }
    if (fault != Fault::kNoCommit) wgmma_commit();
    if (fault == Fault::kTouchedAccumulators) cells[0][0] = 0.f;
    if (fault == Fault::kReleaseBeforeWait) release(empty + stage, fault);
    // The product of the tile before is complete: its stage goes back.
    wgmma_wait<1>();
    if (fault == Fault::kStoresUnfenced && tile > 0) {
      sync_threads(1, kWarpgroupSize);
      char* stored = panels() + (1 + (tile - 1) % kStages) * panel_bytes(kRows);
      store_matrices(stored + panel_offset(threadIdx.x % kRows, 0), {0, 0, 0, 0});
    }
    if (tile > 0 && fault != Fault::kReleaseBeforeWait) release(empty + (tile - 1) % kStages, fault);
  }
  if (fault != Fault::kReadBeforeWait) wgmma_wait<0>();
  fence_registers(cells);
  const int lane = threadIdx.x % kWarpSize, row = threadIdx.x / kWarpSize * kStep + lane / 4;
  for (int i = 0; i < kRows / 8; ++i) {
    for (int j = 0; j < 4; ++j) c[(row + j / 2 * 8) * kRows + 8 * i + lane % 4 * 2 + j % 2] = cells[i][j];
  }
  if (fault == Fault::kReadBeforeWait) wgmma_wait<0>();
}

__global__ void ring_kernel(const __grid_constant__ TensorMap a_map, const __grid_constant__ TensorMap b_map, int tiles,
                            Fault fault, float* c) {
  if (threadIdx.x == 0 && fault != Fault::kNoInit) {
    for (int stage = 0; stage < kStages; ++stage) {
      barrier_init(barriers() + stage, 1);
      barrier_init(barriers() + kStages + stage, fault == Fault::kReleaseForOthers ? 1 : 4);
    }
    barrier_init(barriers() + 2 * kStages, 1);
    if (fault != Fault::kNoInitFence) barrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x < kWarpgroupSize) {
    consume(tiles, fault, c);
  } else if (threadIdx.x == kWarpgroupSize && fault != Fault::kNoProducer) {
    produce(a_map, b_map, tiles, fault);
  }
}

// --- a relay of two warpgroups ---

enum class RelayFault { kNone, kNoSync, kDifferentCounts, kTooManyRegisters, kUnevenRegisters };
constexpr const char* kRelayFaultNames[] = {"none", "no sync", "different counts", "too many registers",
                                            "uneven registers"};
constexpr int kRounds = 3;

// Barrier 1: numbers are ready for the second warpgroup; 2: they are ready for the first.
__global__ void relay_kernel(RelayFault fault, float* numbers) {
  auto* shared = static_cast<float*>(panel_memory());
  const int i = threadIdx.x % kWarpgroupSize, all = 2 * kWarpgroupSize;
  const bool first = threadIdx.x < kWarpgroupSize;
  if (threadIdx.x >= 2 * kWarpgroupSize) return take_registers<256>();  // only where that is too many
  if (first) {
    release_registers<40>();
  } else if (fault != RelayFault::kUnevenRegisters || threadIdx.x >= kWarpgroupSize + kWarpSize) {
    take_registers<232>();
  }
  if (first) shared[i] = numbers[i];
  for (int round = 0; round < kRounds; ++round) {
    if (first) {
      arrive_threads(1, all);
      if (fault != RelayFault::kNoSync) sync_threads(2, fault == RelayFault::kDifferentCounts ? all - 32 : all);
      shared[i] *= 2.f;
    } else {
      sync_threads(1, all);
      shared[kWarpgroupSize - 1 - i] *= 2.f;
      arrive_threads(2, all);
    }
  }
  if (first) numbers[i] = shared[i];
}

template <typename Names>
int index_of(const Names& names, const std::string& name) {
  return static_cast<int>(std::find(std::begin(names), std::end(names), name) - std::begin(names));
}

AttnOperand matrix(const void* data, ScalarType type, int rows, int columns) {
  return {data, type, columns, int64_t{rows} * columns, int64_t{rows} * columns, columns};
}

}  // namespace

const char* load_one_panel(const PanelProblem& p, uint16_t* panel) {
  if (!can_map(p.operand, p.batch, p.heads, p.tokens)) return "the copy engine cannot read the operand";
  TensorMap map;
  if (const char* error = describe(&map, p.operand, p.batch, p.heads, p.tokens, p.rows)) return error;
  return launch(panel_kernel, dim3(1), kWarpSize, kBarrierBytes + panel_bytes(p.rows), nullptr, map, p, panel);
}

const char* multiply(const ProductProblem& p, float* c) {
  const bool change = p.a_from == "changing registers";
  const Shape shape{p.columns,
                    p.depth,
                    p.transpose_a,
                    p.transpose_b,
                    p.a_from == "copy engine",
                    change || p.a_from == "registers",
                    p.a_from != "stored without fence",
                    change};
  const int a_rows = shape.a_rows(), b_rows = shape.b_rows();
  const AttnOperand a = matrix(p.a, p.type, a_rows, kRows * p.depth / a_rows);
  const AttnOperand b = matrix(p.b, p.type, b_rows, p.columns * p.depth / b_rows);
  TensorMap a_map, b_map;
  if (const char* error = describe(&a_map, a, 1, 1, a_rows, a_rows)) return error;
  if (const char* error = describe(&b_map, b, 1, 1, b_rows, b_rows)) return error;
  const int bytes = kBarrierBytes + shape.a_bytes() + shape.b_bytes();
  const auto run = [&](auto kernel, auto element) {
    return launch(kernel, dim3(1), kWarpgroupSize, bytes, nullptr, a_map, b_map, shape,
                  static_cast<const decltype(element)*>(p.a), c);
  };
  return p.type == ScalarType::Float16 ? run(product_kernel<__half>, __half{})
                                       : run(product_kernel<__nv_bfloat16>, __nv_bfloat16{});
}

const char* run_ring(const void* a, const void* b, int64_t tokens, const std::string& fault, float* c) {
  TensorMap a_map, b_map;
  const AttnOperand a_operand = matrix(a, ScalarType::Float16, kRows, kRows);
  const AttnOperand b_operand = matrix(b, ScalarType::Float16, static_cast<int>(tokens), kRows);
  if (const char* error = describe(&a_map, a_operand, 1, 1, kRows, kRows)) return error;
  if (const char* error = describe(&b_map, b_operand, 1, 1, tokens, kRows)) return error;
  const int bytes = kBarrierBytes + (2 + kStages) * panel_bytes(kRows);
  const int tiles = static_cast<int>(ceil_div(tokens, kRows));
  return launch(ring_kernel, dim3(1), kRingThreads, bytes, nullptr, a_map, b_map, tiles,
                static_cast<Fault>(index_of(kFaultNames, fault)), c);
}

const char* run_relay(const std::string& fault, float* numbers) {
  const auto index = static_cast<RelayFault>(index_of(kRelayFaultNames, fault));
  const int threads = (index == RelayFault::kTooManyRegisters ? 3 : 2) * kWarpgroupSize;
  return launch(relay_kernel, dim3(1), threads, kBarrierBytes, nullptr, index, numbers);
}

}  // namespace haste::cuda
