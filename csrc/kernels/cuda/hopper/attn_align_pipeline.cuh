// What the Hopper kernels of attn_align_loss share: how operands come into shared memory, and the product of logits.
//
// A block stays on its multiprocessor and takes one work tile after the other: 64 rows of one (batch, head) for
// each of its consumer warpgroups, the *held* side (queries in the forward and for dq, keys for dk), past which the
// other side streams in tiles of 64 rows through a ring of stages. One warp more, the producer, only loads. It runs
// ahead: the first tiles of the next work tile travel while this one is being worked on.
//
// A tile is 64 rows of student and teacher, in panels (arch_hopper.cuh). Rows past the last token and columns past the
// head dim are zeros.
#pragma once

#include <algorithm>

#include "../../attn_align_loss.h"
#include "../arch_hopper.cuh"
#include "../launch.cuh"
#include "../tensor_map.h"

namespace haste::cuda::hopper {

constexpr int kTileRows = 64;
constexpr int kPanelBytes = kTileRows * static_cast<int>(kPanelRowBytes);
constexpr int kCells = kTileRows / 8;  // of 8 columns, in a row of logits
constexpr int kStep = 16;              // of a contraction, per wgmma
constexpr int kPanelSteps = kPanelColumns / kStep;
constexpr int kDescriptorUnit = 16;  // bytes
constexpr int kWarpgroupWarps = kWarpgroupSize / kWarpSize;
constexpr int kMaxSharedBytes = 227 * 1024;  // of compute capability 9.0
constexpr int kMaxStages = 6;

// Up to here (a power of 2) a distance from the maximum may carry the maximum's rounding, at most 2^−4.
constexpr float kLargestPlainLogit = 1048576.f;
constexpr float kLargestRounding = 0.0625f;

// A block: its consumers, and one warpgroup more, of which one warp loads. All start with equal shares of the
// multiprocessor's registers (65536, in eights per thread); the last one leaves to the consumers what it can spare.
template <int kConsumers>
constexpr int kBlockThreads = (kConsumers + 1) * kWarpgroupSize;
template <int kConsumers>
constexpr int kRegisterShares = (kConsumers + 1) * (65536 / kBlockThreads<kConsumers> / 8 * 8);
template <int kConsumers>
constexpr int kConsumerRegisters = std::min(232, (kRegisterShares<kConsumers> - 24) / kConsumers / 8 * 8);
template <int kConsumers>
constexpr int kProducerRegisters = kRegisterShares<kConsumers> - kConsumers * kConsumerRegisters<kConsumers>;

// Where the operands lie: of each model the held and the streamed side.
struct Model {
  TensorMap held, streamed;
  float scale_log2;  // logit scale · log2(e): the kernels take powers of 2
};

struct PipelineArguments {
  Model student, teacher;
  int heads, tokens, row_blocks, work_tiles;
};

// The work tile that a block takes in its n-th round. One further with every round, so that work tiles of unequal size,
// which come in a regular order, fall to all blocks alike.
__device__ inline int work_tile_of_round(int round) { return round * gridDim.x + (blockIdx.x + round) % gridDim.x; }

// Which rows of which (batch, head) a work tile holds: the tiles of a (batch, head) shared out evenly. Neighbours
// share what they stream: it is in L2 by then.
struct Place {
  int batch, head, first_row, end_row;
  int64_t first_of_head;  // index of this (batch, head)'s first row in the contiguous row results

  __device__ Place(const PipelineArguments& arguments, int work_tile) {
    const int batch_head = work_tile / arguments.row_blocks, row_block = work_tile % arguments.row_blocks;
    const int64_t tiles = (arguments.tokens + kTileRows - 1) / kTileRows;
    batch = batch_head / arguments.heads;
    head = batch_head % arguments.heads;
    first_row = static_cast<int>(row_block * tiles / arguments.row_blocks) * kTileRows;
    end_row = min(static_cast<int>((row_block + 1) * tiles / arguments.row_blocks) * kTileRows, arguments.tokens);
    first_of_head = static_cast<int64_t>(batch_head) * arguments.tokens;
  }
};

// A place in the ring. Every turn around it flips the parity that its barriers are waited for.
template <int kStages>
struct RingPosition {
  int stage = 0;
  unsigned parity = 0;

  __device__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// Each thread of a warp is done with a tile; the barrier counts warps.
__device__ inline void release(Barrier* barrier) {
  __syncwarp();
  if (threadIdx.x % kWarpSize == 0) barrier_arrive(barrier);
}

// The producer warp starts the loads of a tile, 64 rows of both models, and of the barrier's phase.
template <int kStudentPanels, int kTeacherPanels>
__device__ void load_tile(char* student, char* teacher, Barrier* barrier, const TensorMap& student_map,
                          const TensorMap& teacher_map, const Place& place, int first_row) {
  if (threadIdx.x % kWarpSize != 0) return;
  barrier_arrive_and_expect(barrier, (kStudentPanels + kTeacherPanels) * kPanelBytes);
  for (int panel = 0; panel < kStudentPanels; ++panel) {
    load_panel(student + panel * kPanelBytes, student_map, barrier, panel * kPanelColumns, first_row, place.head,
               place.batch);
  }
  for (int panel = 0; panel < kTeacherPanels; ++panel) {
    load_panel(teacher + panel * kPanelBytes, teacher_map, barrier, panel * kPanelColumns, first_row, place.head,
               place.batch);
  }
}

// As load_tile(), into L2 only.
template <int kStudentPanels, int kTeacherPanels>
__device__ void fetch_tile(const TensorMap& student_map, const TensorMap& teacher_map, const Place& place,
                           int first_row) {
  if (threadIdx.x % kWarpSize != 0) return;
  for (int panel = 0; panel < kStudentPanels; ++panel) {
    prefetch_panel(student_map, panel * kPanelColumns, first_row, place.head, place.batch);
  }
  for (int panel = 0; panel < kTeacherPanels; ++panel) {
    prefetch_panel(teacher_map, panel * kPanelColumns, first_row, place.head, place.batch);
  }
}

// Head dims by their steps of 16, which are compile-time numbers: wgmma run at full speed only in straight-line code.
// kExtraBytes: what a kernel adds to every stage.
template <int kStudentSteps, int kTeacherSteps, int kConsumers, int kExtraBytes = 0>
struct Pipeline {
  static constexpr int kThreads = kBlockThreads<kConsumers>;
  static constexpr int kRows = kConsumers * kTileRows;
  static constexpr int kStudentPanels = (kStudentSteps + kPanelSteps - 1) / kPanelSteps;
  static constexpr int kTeacherPanels = (kTeacherSteps + kPanelSteps - 1) / kPanelSteps;
  static constexpr int kTeacherOffset = kStudentPanels * kPanelBytes;  // in a tile
  static constexpr int kTileBytes = kTeacherOffset + kTeacherPanels * kPanelBytes;
  static constexpr int kHeldBytes = kConsumers * (kTileBytes + 2 * static_cast<int>(sizeof(Barrier)));
  static constexpr int kStageBytes = kTileBytes + kExtraBytes + 2 * static_cast<int>(sizeof(Barrier));
  static constexpr int kStages = std::min(kMaxStages, (kMaxSharedBytes - kHeldBytes) / kStageBytes);
  static constexpr int kSharedBytes = kHeldBytes + kStages * kStageBytes;
  static_assert(kStages >= 2 && kExtraBytes % 16 == 0);
  using Position = RingPosition<kStages>;

  char* tiles;  // held ones, then those of the ring; then what is extra, then barriers
  Barrier *held_full, *held_empty, *full, *empty;

  __device__ Pipeline() : tiles(static_cast<char*>(panel_memory())) {
    held_full = reinterpret_cast<Barrier*>(extra(kStages));
    held_empty = held_full + kConsumers;
    full = held_empty + kConsumers;
    empty = full + kStages;
  }

  __device__ char* held(int consumer) const { return tiles + consumer * kTileBytes; }
  __device__ char* streamed(int stage) const { return tiles + (kConsumers + stage) * kTileBytes; }
  __device__ char* extra(int stage) const { return tiles + (kConsumers + kStages) * kTileBytes + stage * kExtraBytes; }

  // The whole block. Tiles become full by one arrival and their bytes, and empty warp by warp.
  __device__ void initialise() const {
    if (threadIdx.x == 0) {
      for (int consumer = 0; consumer < kConsumers; ++consumer) {
        barrier_init(held_full + consumer, 1);
        barrier_init(held_empty + consumer, kWarpgroupWarps);
      }
      for (int stage = 0; stage < kStages; ++stage) {
        barrier_init(full + stage, 1);
        barrier_init(empty + stage, kConsumers * kWarpgroupWarps);
      }
      barrier_init_fence();
    }
    __syncthreads();
  }

  // The producer warp. `add` puts into a stage what is no tile: prepare(place, first_row) may read global memory before
  // the stage is empty, write(extra) stores what it read.
  template <typename Add>
  __device__ void produce(const PipelineArguments& arguments, Add&& add) const {
    const int streamed_tiles = (arguments.tokens + kTileRows - 1) / kTileRows;
    // These go ahead of the next held rows, whose place the consumers leave only with their last product.
    const int ahead = min(streamed_tiles, kStages - 1);
    Position ring;
    unsigned held_parity = 0;  // a bit for every consumer
    for (int round = 0, work_tile; (work_tile = work_tile_of_round(round)) < arguments.work_tiles; ++round) {
      const Place place(arguments, work_tile);
      for (int tile = 0; tile < streamed_tiles; ++tile) {
        if (tile == ahead) load_held(arguments, place, held_parity);
        add.prepare(place, tile * kTileRows);
        barrier_wait(empty + ring.stage, ring.parity ^ 1);
        add.write(extra(ring.stage));
        __syncwarp();
        load(streamed(ring.stage), full + ring.stage, arguments.student.streamed, arguments.teacher.streamed, place,
             tile * kTileRows);
        ring.advance();
      }
      if (ahead == streamed_tiles) load_held(arguments, place, held_parity);
      const int next = work_tile_of_round(round + 1);
      if (next < arguments.work_tiles) fetch_held(arguments, Place(arguments, next));
    }
  }

  // A consumer without rows lets the tiles of a work tile go by.
  __device__ void pass(const PipelineArguments& arguments, Position& ring) const {
    for (int first = 0; first < arguments.tokens; first += kTileRows) {
      barrier_wait(full + ring.stage, ring.parity);
      release(empty + ring.stage);
      ring.advance();
    }
  }

 private:
  static __device__ void load(char* tile, Barrier* barrier, const TensorMap& student, const TensorMap& teacher,
                              const Place& place, int first_row) {
    load_tile<kStudentPanels, kTeacherPanels>(tile, tile + kTeacherOffset, barrier, student, teacher, place, first_row);
  }

  // Into L2, where they wait for their place.
  static __device__ void fetch_held(const PipelineArguments& arguments, const Place& place) {
    for (int first_row = place.first_row; first_row < place.end_row; first_row += kTileRows) {
      fetch_tile<kStudentPanels, kTeacherPanels>(arguments.student.held, arguments.teacher.held, place, first_row);
    }
  }

  // The held tiles of those consumers that have any rows.
  __device__ void load_held(const PipelineArguments& arguments, const Place& place, unsigned& held_parity) const {
    for (int consumer = 0; consumer < kConsumers; ++consumer) {
      const int first_row = place.first_row + consumer * kTileRows;
      if (first_row >= place.end_row) break;
      barrier_wait(held_empty + consumer, (held_parity >> consumer & 1) ^ 1);
      held_parity ^= 1u << consumer;
      load(held(consumer), held_full + consumer, arguments.student.held, arguments.teacher.held, place, first_row);
    }
  }
};

// Starts c = A·Bᵀ of 64 rows each, over kSteps · 16 columns, as a group of its own. Ahead of it: hand_over(c).
template <typename T, int kSteps>
__device__ void start_logits(float (&c)[kCells][4], const char* a, const char* b) {
  const uint64_t a_descriptor = rows_descriptor(a), b_descriptor = rows_descriptor(b);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const int offset = step / kPanelSteps * kPanelBytes + step % kPanelSteps * kStep * static_cast<int>(sizeof(T));
    wgmma<T, kTileRows, false, false>(c, a_descriptor + offset / kDescriptorUnit,
                                      b_descriptor + offset / kDescriptorUnit, step > 0);
  }
  wgmma_commit();
}

// The same with A in registers, fragment by fragment.
template <typename T, int kSteps>
__device__ void start_logits(float (&c)[kCells][4], const uint32_t (&a)[kSteps][4], const char* b) {
  const uint64_t b_descriptor = rows_descriptor(b);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const int offset = step / kPanelSteps * kPanelBytes + step % kPanelSteps * kStep * static_cast<int>(sizeof(T));
    wgmma<T, kTileRows, false>(c, a[step], b_descriptor + offset / kDescriptorUnit, step > 0);
  }
  wgmma_commit();
}

// Hands accumulators and A registers to the tensor cores: all of those that will be under way together, since nothing
// may touch one of them between the start of the first product and the end of the last.
template <typename... Registers>
__device__ void hand_over(Registers&... registers) {
  (fence_registers(registers), ...);
}

// Waits until at most kPending groups are under way, and takes back the accumulators of one that is finished.
template <int kPending, typename Accumulator>
__device__ void finish_product(Accumulator& accumulator) {
  wgmma_wait<kPending>();
  fence_registers(accumulator);
}

// Columns of a tile of logits from `columns_left` on get `value`.
__device__ inline void hide_columns(float (&c)[kCells][4], int columns_left, float value) {
  const int column = threadIdx.x % 4 * 2;
#pragma unroll
  for (int cell = 0; cell < kCells; ++cell) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (cell * 8 + column + i % 2 >= columns_left) c[cell][i] = value;
    }
  }
}

}  // namespace haste::cuda::hopper
