// attn_align_loss on Hopper, backward for any number of tokens: dq and dk, each by its own launch, deterministic and
// without atomics. One kernel template; it holds queries for dq, keys for dk, and streams the other side. For dk, what
// G needs to know of the streamed queries comes with their tile, put there by the producer.
#pragma once

#include "attn_align_gradient.cuh"
#include "attn_align_loss_backward_joint.cuh"

namespace haste::cuda::hopper {

struct NoStatistics {
  __device__ void prepare(const Place&, int) {}
  __device__ void write(void*) {}
};

// As QueryColumns, a query per row of the tile.
struct QueryRows {
  float2 halves[2];

  __device__ void to_probabilities(float (&c)[kCells][4], float scale_log2) const {
#pragma unroll
    for (auto& cell : c) {
#pragma unroll
      for (int i = 0; i < 4; ++i) cell[i] = probability(cell[i], scale_log2, halves[i / 2]);
    }
  }
};

template <typename T, int kStudentSteps, int kTeacherSteps, bool kHoldKeys>
struct Gradient {
  static constexpr int kDimCells = kStudentSteps == 5 ? 9 : 2 * kStudentSteps;  // 72 columns are not 80
  static constexpr int kConsumers = kDimCells > 9 || kTeacherSteps > 4 ? 2 : 3;  // by their registers
  using Lanes = Pipeline<kStudentSteps, kTeacherSteps, kConsumers, kHoldKeys ? sizeof(QueryStatistics) : 0>;

  static __device__ void consume(const GradientArguments& arguments, const Lanes& lanes) {
    const PipelineArguments& pipeline = arguments.pipeline;
    const int warp = threadIdx.x / kWarpSize, consumer = warp / kWarpgroupWarps;
    typename Lanes::Position ring;
    unsigned held_parity = 0;
    for (int round = 0, piece; (piece = piece_of_round(round)) < pipeline.pieces; ++round) {
      const Place place(pipeline, piece);
      if (place.first_row + consumer * kTileRows >= place.end_row) {
        lanes.pass(pipeline, ring);
        continue;
      }
      const int first_row = place.first_row + warp * 16;
      float sum[kDimCells][4] = {}, factors[2];
      QueryRows student, teacher;
      if constexpr (!kHoldKeys) load_queries(student, teacher, factors, arguments, place, first_row);
      barrier_wait(lanes.held_full + consumer, held_parity);
      held_parity ^= 1;
      for (int first = 0; first < pipeline.tokens; first += kTileRows) {
        barrier_wait(lanes.full + ring.stage, ring.parity);
        if constexpr (kHoldKeys) {
          const auto& queries = *reinterpret_cast<const QueryStatistics*>(lanes.extra(ring.stage));
          factors[0] = factors[1] = queries.reference.x / kGradientFactor<T> * arguments.scale;
          accumulate(sum, pipeline, lanes, consumer, ring.stage, QueryColumns{queries.student},
                     QueryColumns{queries.teacher}, kTileRows);
        } else {
          accumulate(sum, pipeline, lanes, consumer, ring.stage, student, teacher, pipeline.tokens - first);
        }
        release(lanes.empty + ring.stage);
        ring.advance();
      }
      sync_threads(1 + consumer, kWarpgroupSize);  // the held tile has been read by all four warps
      store_rows<T>(sum, factors, lanes.held(consumer), kHoldKeys ? arguments.student_k : arguments.student_q, place,
                    first_row);
      fence_shared_for_async();
      release(lanes.held_empty + consumer);
    }
  }

  // The lane's two rows; past the last query G is 0.
  static __device__ void load_queries(QueryRows& student, QueryRows& teacher, float (&factors)[2],
                                      const GradientArguments& arguments, const Place& place, int first_row) {
    const float* upstream = arguments.upstream_of(place);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + threadIdx.x % kWarpSize / 4 + 8 * half;
      student.halves[half] = teacher.halves[half] = {0.f, 0.f};
      factors[half] = 0.f;
      if (row >= arguments.pipeline.tokens) continue;
      student.halves[half] = arguments.student_softmax[place.first_of_head + row];
      teacher.halves[half] = arguments.teacher_softmax[place.first_of_head + row];
      student.halves[half].y *= kGradientFactor<T>;
      teacher.halves[half].y *= kGradientFactor<T>;
      factors[half] = upstream[row * arguments.upstream.stride_token] / kGradientFactor<T> * arguments.scale;
    }
  }

  template <typename Queries>
  static __device__ void accumulate(float (&sum)[kDimCells][4], const PipelineArguments& pipeline, const Lanes& lanes,
                                    int consumer, int stage, const Queries& student, const Queries& teacher,
                                    int columns_left) {
    const char *held = lanes.held(consumer), *streamed = lanes.streamed(stage);
    float s[kCells][4], t[kCells][4];
    hand_over(t, s);
    start_logits<T, kTeacherSteps>(t, held + Lanes::kTeacherOffset, streamed + Lanes::kTeacherOffset);
    start_logits<T, kStudentSteps>(s, held, streamed);
    finish_product<1>(t);
    meanwhile([&] { teacher.to_probabilities(t, pipeline.teacher.scale_log2); });
    finish_product<0>(s);
    student.to_probabilities(s, pipeline.student.scale_log2);
    subtract(s, t);
    // A key past the last is zeros, but its G is not, and infinity times zero would be NaN.
    if (columns_left < kTileRows) hide_columns(s, columns_left, 0.f);
    uint32_t g[kTileRows / kStep][4];
    pack_tile<T>(g, s);
    hand_over(sum, g);
    start_accumulation<T>(sum, g, streamed);
    finish_product<0>(sum);
  }
};

template <typename T, int kStudentSteps, int kTeacherSteps, bool kHoldKeys>
__global__ void __launch_bounds__(kBlockThreads<Gradient<T, kStudentSteps, kTeacherSteps, kHoldKeys>::kConsumers>, 1)
    gradient_kernel(const __grid_constant__ GradientArguments arguments) {
  using Kernel = Gradient<T, kStudentSteps, kTeacherSteps, kHoldKeys>;
  constexpr int kConsumerThreads = Kernel::kConsumers * kWarpgroupSize;
  const typename Kernel::Lanes lanes;
  lanes.initialise();
  if (threadIdx.x < kConsumerThreads) {
    take_registers<kConsumerRegisters<Kernel::kConsumers>>();
    Kernel::consume(arguments, lanes);
  } else {
    release_registers<kProducerRegisters<Kernel::kConsumers>>();
    if (threadIdx.x >= kConsumerThreads + kWarpSize) return;
    if constexpr (kHoldKeys) {
      lanes.produce(arguments.pipeline, StatisticsLoader</*kWeighted=*/true>(arguments));
    } else {
      lanes.produce(arguments.pipeline, NoStatistics{});
    }
  }
}

template <typename T, int kStudentSteps, int kTeacherSteps, bool kHoldKeys>
const char* launch_gradient(const AttnAlignProblem& problem, const AttnAlignBackward& backward, void* stream) {
  using Lanes = typename Gradient<T, kStudentSteps, kTeacherSteps, kHoldKeys>::Lanes;
  if ((kHoldKeys ? backward.student_k : backward.student_q).data == nullptr) return nullptr;
  GradientArguments arguments{};
  const char* error = describe_gradients(&arguments, problem, backward, kHoldKeys, Lanes::kRows);
  if (error != nullptr) return error;
  return launch_pieces<Lanes>(gradient_kernel<T, kStudentSteps, kTeacherSteps, kHoldKeys>, arguments, stream);
}

// One element type; attn_align_loss_backward.cu calls it.
template <typename T>
const char* launch_gradients(const AttnAlignProblem& problem, const AttnAlignBackward& backward, void* stream) {
  return dispatch(problem, [&](auto student_steps, auto teacher_steps) {
    if constexpr (JointShared<student_steps, teacher_steps>::kFits) {
      if (is_joint(problem, backward)) {
        return launch_joint_gradients<T, student_steps, teacher_steps>(problem, backward, stream);
      }
    }
    const char* error = launch_gradient<T, student_steps, teacher_steps, false>(problem, backward, stream);
    if (error != nullptr) return error;
    return launch_gradient<T, student_steps, teacher_steps, true>(problem, backward, stream);
  });
}

}  // namespace haste::cuda::hopper
