// attn_align_loss on Hopper, backward for 129 to 256 tokens when both gradients are wanted: one block computes dq and
// dk of a (batch, head) from one set of logits, so with half the exponentials and half the reads of one gradient after
// the other. Deterministic, no atomics.
//
// All keys lie in shared memory; the queries stream past in tiles of 64. Of the two consumers each holds two blocks of
// 64 keys. Of a tile's logits with one block it forms Gᵀ, in registers, adds Gᵀ·Q to the block's dk, and leaves Gᵀ in
// shared memory. When both consumers have done so, one of them, by turns, computes the tile's dq = G·K. It does that a
// tile later, when the other is sure to be there; for G has two buffers.
#pragma once

#include "attn_align_gradient.cuh"

namespace haste::cuda::hopper {

template <int kStudentSteps, int kTeacherSteps>
struct JointShared {
  static constexpr int kConsumers = 2;
  static constexpr int kThreads = kBlockThreads<kConsumers>;
  static constexpr int kKeyBlocks = 4;
  static constexpr int kStages = 2;    // of queries
  static constexpr int kGBuffers = 2;  // the one of parity c belongs to consumer c
  static constexpr int kRows = kKeyBlocks * kTileRows;
  static constexpr int kStudentPanels = (kStudentSteps + kPanelSteps - 1) / kPanelSteps;
  static constexpr int kTeacherPanels = (kTeacherSteps + kPanelSteps - 1) / kPanelSteps;
  static constexpr int kStudentBytes = kStudentPanels * kPanelBytes, kTeacherBytes = kTeacherPanels * kPanelBytes;
  static constexpr int kTileBytes = kStudentBytes + kTeacherBytes;
  static constexpr int kGBytes = kKeyBlocks * kPanelBytes;  // a panel of 64 keys × 64 queries per block of keys
  static constexpr int kBarriers = kKeyBlocks + 1 + 2 * kStages + 2 * kGBuffers;
  static constexpr int kSharedBytes = kKeyBlocks * kTileBytes + kStages * (kTileBytes + int(sizeof(QueryStatistics))) +
                                      kGBuffers * kGBytes + kBarriers * int(sizeof(Barrier));
  static constexpr bool kFits = kSharedBytes <= kMaxSharedBytes && kStudentSteps <= 5;  // or dk would spill

  char *student_keys, *teacher_keys, *queries, *g;
  QueryStatistics* statistics;
  Barrier *keys_full, *keys_empty, *full, *empty, *g_full, *g_empty;

  __device__ JointShared() {
    student_keys = static_cast<char*>(panel_memory());
    teacher_keys = student_keys + kKeyBlocks * kStudentBytes;
    queries = teacher_keys + kKeyBlocks * kTeacherBytes;
    g = queries + kStages * kTileBytes;
    statistics = reinterpret_cast<QueryStatistics*>(g + kGBuffers * kGBytes);
    keys_full = reinterpret_cast<Barrier*>(statistics + kStages);
    keys_empty = keys_full + kKeyBlocks;
    full = keys_empty + 1;
    empty = full + kStages;
    g_full = empty + kStages;
    g_empty = g_full + kGBuffers;
  }

  __device__ void initialise() const {
    constexpr int kWarps = kConsumers * kWarpgroupWarps;
    if (threadIdx.x == 0) {
      for (int block = 0; block < kKeyBlocks; ++block) barrier_init(keys_full + block, 1);
      barrier_init(keys_empty, kWarps);
      for (int stage = 0; stage < kStages; ++stage) {
        barrier_init(full + stage, 1);
        barrier_init(empty + stage, kWarps);
      }
      for (int buffer = 0; buffer < kGBuffers; ++buffer) {
        barrier_init(g_full + buffer, kWarps);
        barrier_init(g_empty + buffer, kWarpgroupWarps);
      }
      barrier_init_fence();
    }
    __syncthreads();
  }

  // The producer warp. The first queries of a work tile go ahead of its keys, whose place is free last.
  __device__ void produce(const GradientArguments& arguments) const {
    const PipelineArguments& pipeline = arguments.pipeline;
    const int tiles = (pipeline.tokens + kTileRows - 1) / kTileRows;
    StatisticsLoader</*kWeighted=*/false> loader(arguments);
    RingPosition<kStages> ring;
    unsigned keys_parity = 0;
    for (int round = 0, work_tile; (work_tile = work_tile_of_round(round)) < pipeline.work_tiles; ++round) {
      const Place place(pipeline, work_tile);
      for (int tile = 0; tile < tiles; ++tile) {
        if (tile == kStages) load_keys(pipeline, place, keys_parity);  // of more than 128 tokens, there is such a tile
        loader.prepare(place, tile * kTileRows);
        barrier_wait(empty + ring.stage, ring.parity ^ 1);
        loader.write(statistics + ring.stage);
        __syncwarp();
        char* stage = queries + ring.stage * kTileBytes;
        load_tile<kStudentPanels, kTeacherPanels>(stage, stage + kStudentBytes, full + ring.stage,
                                                  pipeline.student.streamed, pipeline.teacher.streamed, place,
                                                  tile * kTileRows);
        ring.advance();
      }
      keys_parity ^= 1;
      const int next = work_tile_of_round(round + 1);
      if (next < pipeline.work_tiles) fetch_keys(pipeline, Place(pipeline, next));
    }
  }

 private:
  // Into L2, where they wait for their place.
  __device__ void fetch_keys(const PipelineArguments& pipeline, const Place& place) const {
    for (int first_key = 0; first_key < pipeline.tokens; first_key += kTileRows) {
      fetch_tile<kStudentPanels, kTeacherPanels>(pipeline.student.held, pipeline.teacher.held, place, first_key);
    }
  }

  __device__ void load_keys(const PipelineArguments& pipeline, const Place& place, unsigned parity) const {
    barrier_wait(keys_empty, parity ^ 1);
    for (int block = 0; block < kKeyBlocks; ++block) {
      load_tile<kStudentPanels, kTeacherPanels>(student_keys + block * kStudentBytes,
                                                teacher_keys + block * kTeacherBytes, keys_full + block,
                                                pipeline.student.held, pipeline.teacher.held, place, block * kTileRows);
    }
  }
};

template <typename T, int kStudentSteps, int kTeacherSteps, bool kSplit>
class JointConsumer {
 public:
  using Shared = JointShared<kStudentSteps, kTeacherSteps>;

  __device__ JointConsumer(const GradientArguments& arguments, const Shared& shared)
      : arguments_(arguments), shared_(shared), consumer_(warp_index() / kWarpgroupWarps) {}

  __device__ void run() {
    const PipelineArguments& pipeline = arguments_.pipeline;
    RingPosition<Shared::kStages> ring;
    RingPosition<Shared::kGBuffers> buffer;
    unsigned keys_parity = 0;
    for (int round = 0, work_tile; (work_tile = work_tile_of_round(round)) < pipeline.work_tiles; ++round) {
      const Place place(pipeline, work_tile);
      float dk[kBlocks][kDimCells][4] = {};
      TeacherKeys teacher_keys[kBlocks];
      float reference = *arguments_.grad_out_of(place);  // unless there are tiles that are not plain
      for (int first_query = 0; first_query < pipeline.tokens; first_query += kTileRows) {
        const bool last = first_query + kTileRows >= pipeline.tokens;
        barrier_wait(shared_.full + ring.stage, ring.parity);
        const QueryStatistics& statistics = shared_.statistics[ring.stage];
#pragma unroll
        for (int i = 0; i < kBlocks; ++i) {
          const int block = block_of(i);
          if (first_query == 0) {
            barrier_wait(shared_.keys_full + block, keys_parity);
            teacher_keys[i].take(shared_.teacher_keys + block * Shared::kTeacherBytes);
          }
          take_queries(dk[i], teacher_keys[i], shared_.queries + ring.stage * Shared::kTileBytes, statistics, block,
                       buffer, pipeline.tokens - block * kTileRows, reference);
        }
        fence_shared_for_async();
        release(shared_.g_full + buffer.stage);
        release(shared_.empty + ring.stage);
        ring.advance();
        buffer.advance();
        if (first_query > 0 && buffer.stage == consumer_) give_dq(place, first_query - kTileRows, last);
      }
      if (buffer.stage != consumer_) give_dq(place, (pipeline.tokens - 1) / kTileRows * kTileRows, true);
      give_dk(dk, reference / kGradientFactor<T> * arguments_.scale, place);
      keys_parity ^= 1;
    }
  }

 private:
  static constexpr int kDimCells = kStudentSteps == 5 ? 9 : 2 * kStudentSteps;  // 72 columns are not 80
  static constexpr int kBlocks = Shared::kKeyBlocks / Shared::kConsumers;
  static constexpr int kSteps = kTileRows / kStep;
  using TeacherKeys = HeldTile<T, kTeacherSteps, kTeacherSteps <= 4>;  // by their registers; shared memory binds
  static_assert(kBlocks * Shared::kStudentBytes <= Shared::kGBytes, "a buffer of G takes a consumer's dk");

  __device__ int block_of(int i) const { return i * Shared::kConsumers + consumer_; }

  // One tile of queries with one block of keys.
  __device__ void take_queries(float (&dk)[kDimCells][4], const TeacherKeys& teacher_keys, const char* queries,
                               const QueryStatistics& statistics, int block, RingPosition<Shared::kGBuffers> buffer,
                               int keys_left, float& reference) const {
    float s[kCells][4], t[kCells][4];
    hand_over(t, s);
    teacher_keys.start_logits_with(t, queries + Shared::kStudentBytes);
    start_logits<T, kStudentSteps>(s, shared_.student_keys + block * Shared::kStudentBytes, queries);
    finish_product<1>(t);
    const QueryColumns teacher{statistics.teacher_offset, statistics.teacher};
    const QueryColumns student{statistics.student_offset, statistics.student};
    const bool plain = teacher.is_plain();
    if (plain) {
      teacher.to_probabilities<true>(t, arguments_.pipeline.teacher.scale_log2);
    } else {
      teacher.to_probabilities<false>(t, arguments_.pipeline.teacher.scale_log2);
    }
    __syncwarp();  // what waits for products needs the whole warp
    finish_product<0>(s);
    if (plain) {
      student.to_probabilities<true>(s, arguments_.pipeline.student.scale_log2);
      subtract(s, t);
    } else {
      student.to_probabilities<false>(s, arguments_.pipeline.student.scale_log2);
      subtract(s, t);
    }
    if (keys_left < kTileRows) hide_keys(s, keys_left);

    uint32_t g[kSteps][4];
    pack_tile<T>(g, s);
    const int lane = threadIdx.x % kWarpSize;
    char* rows = shared_.g + buffer.stage * Shared::kGBytes + block * kPanelBytes + warp_row() * int(kPanelRowBytes);
    barrier_wait(shared_.g_empty + buffer.stage, buffer.parity ^ 1);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      store_matrices(chunk_of(rows, lane % 16, 2 * step + lane / 16), g[step]);
    }

    if (!plain) {
      reference = statistics.reference.x;
      weigh(s, statistics.weight);
      pack_tile<T>(g, s);
    }
    __syncwarp();
    hand_over(dk, g);
    start_accumulation<T, kSplit>(dk, g, queries);
    finish_product<0>(dk);
  }

  // A key past the last, a row here, is zeros, but its G is not, and in dq infinity times zero would be NaN.
  static __device__ void hide_keys(float (&g)[kCells][4], int keys_left) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (warp_row() + static_cast<int>(threadIdx.x) % kWarpSize / 4 + i / 2 * 8 < keys_left) continue;
#pragma unroll
      for (auto& cell : g) cell[i] = 0.f;
    }
  }

  // Gives every query, a column, its weight in dk.
  static __device__ void weigh(float (&c)[kCells][4], const float* weights) {
#pragma unroll
    for (int cell = 0; cell < kCells; ++cell) {
      const auto pair = reinterpret_cast<const float2*>(weights)[cell * 4 + threadIdx.x % 4];
#pragma unroll
      for (int i = 0; i < 4; ++i) c[cell][i] *= i % 2 == 0 ? pair.x : pair.y;
    }
  }

  // dq of 64 queries, whose G lies in this consumer's buffer: G (64 × 256, contracted along the rows of its panels) ·
  // K. `last`: of this consumer and work tile. It needs the keys no more then, but the buffer once more, for dk.
  __device__ void give_dq(const Place& place, int first_query, bool last) {
    char* g_buffer = shared_.g + consumer_ * Shared::kGBytes;
    const int first_row = first_query + warp_row();
    const float* grad_out = arguments_.grad_out_of(place);
    float factors[2] = {}, dq[kDimCells][4];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + static_cast<int>(threadIdx.x) % kWarpSize / 4 + 8 * half;
      if (row >= arguments_.pipeline.tokens) continue;
      factors[half] = grad_out[row * arguments_.grad_out.stride_token] / kGradientFactor<T> * arguments_.scale;
    }
    barrier_wait(shared_.g_full + consumer_, dq_parity_);
    dq_parity_ ^= 1;

    hand_over(dq);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < Shared::kKeyBlocks * kSteps; ++step) {
      constexpr int kStepBytes = kStep * static_cast<int>(kPanelRowBytes);
      const int block = step / kSteps, offset = step % kSteps * kStepBytes;
      multiply<T, kSplit>(
          dq, columns_descriptor(g_buffer + block * kPanelBytes + offset, kPanelBytes),
          columns_descriptor(shared_.student_keys + block * Shared::kStudentBytes + offset, kPanelBytes), step > 0);
    }
    wgmma_commit();
    finish_product<0>(dq);
    if (last) release(shared_.keys_empty);
    sync_threads(1 + consumer_, kWarpgroupSize);  // G has been read by all four warps, and is room for the rows
    store_rows<T>(dq, factors, g_buffer, arguments_.student_q, place, first_row);
    if (!last) release(shared_.g_empty + consumer_);
  }

  __device__ void give_dk(const float (&dk)[kBlocks][kDimCells][4], float factor, const Place& place) const {
    const float factors[2] = {factor, factor};
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
      store_rows<T>(dk[i], factors, shared_.g + consumer_ * Shared::kGBytes + i * Shared::kStudentBytes,
                    arguments_.student_k, place, block_of(i) * kTileRows + warp_row());
    }
    release(shared_.g_empty + consumer_);
  }

  // Of the 64 rows of a tile, the first of this warp.
  static __device__ int warp_row() { return threadIdx.x / kWarpSize % kWarpgroupWarps * 16; }

  const GradientArguments& arguments_;
  const Shared& shared_;
  const int consumer_;
  unsigned dq_parity_ = 0;
};

template <typename T, int kStudentSteps, int kTeacherSteps, bool kSplit>
__global__ void __launch_bounds__(kBlockThreads<2>, 1)
    joint_gradient_kernel(const __grid_constant__ GradientArguments arguments) {
  using Consumer = JointConsumer<T, kStudentSteps, kTeacherSteps, kSplit>;
  using Shared = typename Consumer::Shared;
  constexpr int kConsumerThreads = Shared::kConsumers * kWarpgroupSize;
  const Shared shared;
  shared.initialise();
  if (threadIdx.x < kConsumerThreads) {
    take_registers<kConsumerRegisters<Shared::kConsumers>>();
    Consumer(arguments, shared).run();
  } else {
    release_registers<kProducerRegisters<Shared::kConsumers>>();
    if (threadIdx.x < kConsumerThreads + kWarpSize) shared.produce(arguments);
  }
}

template <typename T, int kStudentSteps, int kTeacherSteps, bool kSplit>
const char* launch_joint_gradients(const AttnAlignProblem& problem, const AttnAlignBackward& backward, void* stream) {
  using Shared = JointShared<kStudentSteps, kTeacherSteps>;
  GradientArguments arguments{};
  const char* error = describe_gradients(&arguments, problem, backward, /*hold_keys=*/true, Shared::kRows);
  if (error != nullptr) return error;
  return launch_work_tiles<Shared>(joint_gradient_kernel<T, kStudentSteps, kTeacherSteps, kSplit>, arguments, stream);
}

// Fewer tokens would leave blocks of keys empty; what has more, or does not fit a block, takes a launch per gradient.
inline bool is_joint(const AttnAlignProblem& problem, const AttnAlignBackward& backward) {
  return problem.tokens > 128 && problem.tokens <= 256 && backward.student_q.data != nullptr &&
         backward.student_k.data != nullptr;
}

}  // namespace haste::cuda::hopper
