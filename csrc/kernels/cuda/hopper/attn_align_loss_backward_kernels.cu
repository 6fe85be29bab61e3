// attn_align_loss on Hopper, backward for any number of tokens: dq and dk, each by its own launch, deterministic and
// without atomics. One kernel template; it holds queries for dq, keys for dk, and streams the other side. For dk, what
// G needs to know of the streamed queries comes with their tile, put there by the producer.
//
// Compiled once per HASTE_ELEMENT: float16 bfloat16
#include "../dispatch.h"
#include "../element_type.cuh"
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
  bool plain;  // all of the warp's

  __device__ bool is_plain() const { return plain; }

  template <bool kPlain>
  __device__ void to_probabilities(float (&c)[kCells][4], float scale_log2) const {
#pragma unroll
    for (auto& cell : c) {
#pragma unroll
      for (int i = 0; i < 4; ++i) cell[i] = probability<kPlain>(cell[i], scale_log2, halves[i / 2]);
    }
  }
};

template <typename T, int kStudentSteps, int kTeacherSteps, bool kHoldKeys, bool kSplit>
struct Gradient {
  static constexpr int kDimCells = kStudentSteps == 5 ? 9 : 2 * kStudentSteps;   // 72 columns are not 80
  static constexpr int kConsumers = kDimCells > 9 || kTeacherSteps > 4 ? 2 : 3;  // by their registers
  using Lanes = Pipeline<kStudentSteps, kTeacherSteps, kConsumers, kHoldKeys ? sizeof(QueryStatistics) : 0>;
  // Shared memory binds dk; there is room for the teacher's keys where there are three consumers.
  using HeldStudent = HeldTile<T, kStudentSteps, false>;
  using HeldTeacher = HeldTile<T, kTeacherSteps, kHoldKeys && kConsumers == 3>;

  static __device__ void consume(const GradientArguments& arguments, const Lanes& lanes) {
    const PipelineArguments& pipeline = arguments.pipeline;
    const int warp = warp_index(), consumer = warp / kWarpgroupWarps;
    typename Lanes::Position ring;
    unsigned held_parity = 0;
    for (int round = 0, work_tile; (work_tile = work_tile_of_round(round)) < pipeline.work_tiles; ++round) {
      const Place place(pipeline, work_tile);
      if (place.first_row + consumer * kTileRows >= place.end_row) {
        lanes.pass(pipeline, ring);
        continue;
      }
      const int first_row = place.first_row + warp * 16;
      float sum[kDimCells][4] = {}, factors[2];
      QueryRows student, teacher;
      if constexpr (kHoldKeys) {
        factors[0] = *arguments.grad_out_of(place);  // unless there are tiles that are not plain
      } else {
        load_queries(student, teacher, factors, arguments, place, first_row);
      }
      barrier_wait(lanes.held_full + consumer, held_parity);
      held_parity ^= 1;
      HeldStudent held_student;
      HeldTeacher held_teacher;
      held_student.take(lanes.held(consumer));
      held_teacher.take(lanes.held(consumer) + Lanes::kTeacherOffset);
      for (int first = 0; first < pipeline.tokens; first += kTileRows) {
        barrier_wait(lanes.full + ring.stage, ring.parity);
        if constexpr (kHoldKeys) {
          const auto& queries = *reinterpret_cast<const QueryStatistics*>(lanes.extra(ring.stage));
          accumulate(sum, pipeline, lanes, held_student, held_teacher, ring.stage,
                     QueryColumns{queries.student_offset, queries.student},
                     QueryColumns{queries.teacher_offset, queries.teacher}, kTileRows, &factors[0]);
        } else {
          accumulate(sum, pipeline, lanes, held_student, held_teacher, ring.stage, student, teacher,
                     pipeline.tokens - first, nullptr);
        }
        release(lanes.empty + ring.stage);
        ring.advance();
      }
      if constexpr (kHoldKeys) factors[0] = factors[1] = factors[0] / kGradientFactor<T> * arguments.scale;
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
    const float* grad_out = arguments.grad_out_of(place);
    bool plain = arguments.is_uniform();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + threadIdx.x % kWarpSize / 4 + 8 * half;
      student.halves[half] = teacher.halves[half] = {0.f, 0.f};
      factors[half] = 0.f;
      if (row >= arguments.pipeline.tokens) continue;
      student.halves[half] = arguments.student_softmax[place.first_of_head + row];
      teacher.halves[half] = arguments.teacher_softmax[place.first_of_head + row];
      plain &= is_plain(student.halves[half]) && is_plain(teacher.halves[half]);
      factors[half] = grad_out[row * arguments.grad_out.stride_token] / kGradientFactor<T> * arguments.scale;
    }
    student.plain = teacher.plain = plain = !__any_sync(kFullWarp, !plain);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (plain) {
        student.halves[half].x = offset_of(student.halves[half]);
        teacher.halves[half].x = offset_of(teacher.halves[half]);
      } else {
        student.halves[half].y *= kGradientFactor<T>;
        teacher.halves[half].y *= kGradientFactor<T>;
      }
    }
  }

  // Without a branch around it the assembler moves most of the work on t behind the wait for s. A tile that is not
  // plain gives grad_out's reference, where it is wanted.
  template <typename Queries>
  static __device__ void accumulate(float (&sum)[kDimCells][4], const PipelineArguments& pipeline, const Lanes& lanes,
                                    const HeldStudent& held_student, const HeldTeacher& held_teacher, int stage,
                                    const Queries& student, const Queries& teacher, int columns_left,
                                    float* reference) {
    const char* streamed = lanes.streamed(stage);
    float s[kCells][4], t[kCells][4];
    hand_over(t, s);
    held_teacher.start_logits_with(t, streamed + Lanes::kTeacherOffset);
    held_student.start_logits_with(s, streamed);
    finish_product<1>(t);
    const bool plain = teacher.is_plain();
    if (plain) {
      teacher.template to_probabilities<true>(t, pipeline.teacher.scale_log2);
    } else {
      teacher.template to_probabilities<false>(t, pipeline.teacher.scale_log2);
    }
    __syncwarp();  // what waits for products needs the whole warp
    finish_product<0>(s);
    if (plain) {
      student.template to_probabilities<true>(s, pipeline.student.scale_log2);
      subtract(s, t);
    } else {
      student.template to_probabilities<false>(s, pipeline.student.scale_log2);
      subtract(s, t);
      if constexpr (kHoldKeys) {
        *reference = reinterpret_cast<const QueryStatistics*>(lanes.extra(stage))->reference.x;
      }
    }
    // A key past the last is zeros, but its G is not, and infinity times zero would be NaN.
    if (columns_left < kTileRows) hide_columns(s, columns_left, 0.f);
    uint32_t g[kTileRows / kStep][4];
    pack_tile<T>(g, s);
    __syncwarp();
    hand_over(sum, g);
    start_accumulation<T, kSplit>(sum, g, streamed);
    finish_product<0>(sum);
  }
};

template <typename T, int kStudentSteps, int kTeacherSteps, bool kHoldKeys, bool kSplit>
__global__ void __launch_bounds__(
    kBlockThreads<Gradient<T, kStudentSteps, kTeacherSteps, kHoldKeys, kSplit>::kConsumers>, 1)
    gradient_kernel(const __grid_constant__ GradientArguments arguments) {
  using Kernel = Gradient<T, kStudentSteps, kTeacherSteps, kHoldKeys, kSplit>;
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

template <typename T, int kStudentSteps, int kTeacherSteps, bool kHoldKeys, bool kSplit>
const char* launch_gradient(const AttnAlignProblem& problem, const AttnAlignBackward& backward, void* stream) {
  using Lanes = typename Gradient<T, kStudentSteps, kTeacherSteps, kHoldKeys, kSplit>::Lanes;
  if ((kHoldKeys ? backward.student_k : backward.student_q).data == nullptr) return nullptr;
  GradientArguments arguments{};
  const char* error = describe_gradients(&arguments, problem, backward, kHoldKeys, Lanes::kRows);
  if (error != nullptr) return error;
  return launch_work_tiles<Lanes>(gradient_kernel<T, kStudentSteps, kTeacherSteps, kHoldKeys, kSplit>, arguments,
                                  stream);
}

template <typename T, int kStudentSteps, int kTeacherSteps, bool kSplit>
const char* launch_both(const AttnAlignProblem& problem, const AttnAlignBackward& backward, void* stream) {
  if constexpr (JointShared<kStudentSteps, kTeacherSteps>::kFits) {
    if (is_joint(problem, backward)) {
      return launch_joint_gradients<T, kStudentSteps, kTeacherSteps, kSplit>(problem, backward, stream);
    }
  }
  const char* error = launch_gradient<T, kStudentSteps, kTeacherSteps, false, kSplit>(problem, backward, stream);
  if (error != nullptr) return error;
  return launch_gradient<T, kStudentSteps, kTeacherSteps, true, kSplit>(problem, backward, stream);
}

// attn_align_loss_backward.cu calls it.
template <typename T>
const char* launch_gradients(const AttnAlignProblem& problem, const AttnAlignBackward& backward, void* stream) {
  bool split = false;
  if (const char* reason = choose_split(&split)) return reason;
  return dispatch(problem, [&](auto student_steps, auto teacher_steps) {
    if constexpr (student_steps == 5) {
      if (split) return launch_both<T, student_steps, teacher_steps, true>(problem, backward, stream);
    }
    return launch_both<T, student_steps, teacher_steps, false>(problem, backward, stream);
  });
}
template const char* launch_gradients<elements::HASTE_ELEMENT>(const AttnAlignProblem&, const AttnAlignBackward&,
                                                               void*);

}  // namespace haste::cuda::hopper
