// attn_align_loss on Hopper, forward. Per row, online over tiles of keys, in powers of 2:
//   m_s, l_s = max and Σ 2^(s − m_s);  m_t, l_t the same of t;  x = Σ 2^(t − m_t)·(s − m_s)
//   loss = log2 l_s − x / l_t
// Measuring s from its maximum keeps the digits that lse_s − Σ softmax(t)·s would cancel. A distance s − m_s is one
// fused multiply-add of the product itself, so it is rounded once; backward forms the same distance from the same
// maximum. That of the maximum itself is then not 0 but the rounding of m_s, of which the quotients by l know nothing.
//
// Each consumer starts both products of a tile and works on s while the tensor cores form t.
#include "attn_align_hopper.h"
#include "attn_align_launch.cuh"

namespace haste::cuda::hopper {
namespace {

constexpr int kConsumers = 4;
constexpr float kLn2 = 0.6931471805599453f;

constexpr float kLargest = 3e38f;
constexpr float kLargestLogit = 1e38f;  // logits are held to finite numbers, lest ∞ − ∞ make NaN of what was none

struct ForwardArguments {
  PipelineArguments pipeline;
  float* loss;
  float2 *student_softmax, *teacher_softmax;  // {m, 1 / l} per row
};

// The largest logit of one of the lane's two rows in a tile. A negative scale makes it the smallest product.
__device__ inline float largest_logit(const float (&dots)[kCells][4], int half, float scale) {
  float extreme = dots[0][2 * half];
  if (scale < 0.f) {
#pragma unroll
    for (const auto& cell : dots) extreme = fminf(extreme, fminf(cell[2 * half], cell[2 * half + 1]));
  } else {
#pragma unroll
    for (const auto& cell : dots) extreme = fmaxf(extreme, fmaxf(cell[2 * half], cell[2 * half + 1]));
  }
  return reduce_max<4>(extreme * scale);
}

// Running maximum and sum of one model's two rows of a lane (lane/4 and lane/4 + 8). The maximum is that of the whole
// row, the sum that of the lane's own columns until the end.
struct OnlineSoftmax {
  float maximum[2] = {-INFINITY, -INFINITY};
  float sum[2] = {0.f, 0.f};

  // Turns a tile of products into the logits' distances from the new maximum. Gives how far the maximum has risen, and
  // the factor by which what was summed before must shrink. Columns past the last key are as far away as can be: their
  // power of 2 is 0, and 0 times a finite number is 0, not NaN.
  __device__ void update(float (&dots)[kCells][4], float scale, int keys_left, float (&rise)[2],
                         float (&correction)[2]) {
    const bool last = keys_left < kTileRows;
    if (last) hide_columns(dots, keys_left, scale < 0.f ? kLargest : -kLargest);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float higher = fmaxf(maximum[half], hold_within(largest_logit(dots, half, scale), kLargestLogit));
      rise[half] = maximum[half] == -INFINITY ? 0.f : higher - maximum[half];
      correction[half] = fast_exp2(maximum[half] - higher);
      maximum[half] = higher;
      sum[half] *= correction[half];
      if (fabsf(higher) <= kLargestPlainLogit) {
#pragma unroll
        for (auto& cell : dots) {
          cell[2 * half] = fmaf(cell[2 * half], scale, -higher);
          cell[2 * half + 1] = fmaf(cell[2 * half + 1], scale, -higher);
        }
      } else {  // the largest must be at distance 0, however much rounding takes
#pragma unroll
        for (auto& cell : dots) {
          cell[2 * half] = hold_within(__fmul_rn(cell[2 * half], scale), kLargestLogit) - higher;
          cell[2 * half + 1] = hold_within(__fmul_rn(cell[2 * half + 1], scale), kLargestLogit) - higher;
        }
      }
    }
    if (last) hide_columns(dots, keys_left, -kLargest);
  }
};

// The row results of one consumer's 64 rows, tile by tile.
struct RowResults {
  OnlineSoftmax student, teacher;
  float x[2] = {0.f, 0.f};

  // kMayOverflow: a product may be −∞, which times a power of 0 would be NaN.
  template <bool kMayOverflow>
  __device__ void take_student(float (&s)[kCells][4], float scale, int keys_left) {
    float rise[2], correction[2];
    student.update(s, scale, keys_left, rise, correction);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      x[half] -= teacher.sum[half] * rise[half];
#pragma unroll
      for (auto& cell : s) {
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          student.sum[half] += fast_exp2(cell[i]);
          if (kMayOverflow) cell[i] = fmaxf(cell[i], -kLargest);  // if it was NaN, the sum is too
        }
      }
    }
  }

  // `distances`: what take_student left of s.
  __device__ void take_teacher(float (&t)[kCells][4], const float (&distances)[kCells][4], float scale,
                               int keys_left) {
    float rise[2], correction[2];
    teacher.update(t, scale, keys_left, rise, correction);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      x[half] *= correction[half];
#pragma unroll
      for (int cell = 0; cell < kCells; ++cell) {
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          const float power = fast_exp2(t[cell][i]);
          teacher.sum[half] += power;
          x[half] = fmaf(power, distances[cell][i], x[half]);
        }
      }
    }
  }

  __device__ void store(const ForwardArguments& arguments, const Place& place, int first_row) const {
    const int lane = threadIdx.x % kWarpSize;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float student_sum = reduce_sum<4>(student.sum[half]);
      const float teacher_sum = reduce_sum<4>(teacher.sum[half]);
      const float x_sum = reduce_sum<4>(x[half]);
      const int row = first_row + lane / 4 + 8 * half;
      if (lane % 4 != 0 || row >= place.end_row) continue;
      const int64_t index = place.first_of_head + row;
      const float loss = kLn2 * (log2f(student_sum) - x_sum / teacher_sum);
      arguments.loss[index] = arguments.pipeline.tokens == 1 ? 0.f * loss : loss;  // exactly, whatever exp2 rounds
      arguments.student_softmax[index] = {student.maximum[half], 1.f / student_sum};
      arguments.teacher_softmax[index] = {teacher.maximum[half], 1.f / teacher_sum};
    }
  }
};

template <typename T, int kStudentSteps, int kTeacherSteps>
struct Forward {
  using Lanes = Pipeline<kStudentSteps, kTeacherSteps, kConsumers>;

  static __device__ void consume(const ForwardArguments& arguments, const Lanes& lanes) {
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
      RowResults rows;
      barrier_wait(lanes.held_full + consumer, held_parity);
      held_parity ^= 1;
      for (int key = 0; key < pipeline.tokens; key += kTileRows) {
        const int keys_left = pipeline.tokens - key;
        take_keys(rows, pipeline, lanes, consumer, ring.stage, ring.parity, keys_left);
        ring.advance();
      }
      rows.store(arguments, place, place.first_row + warp * 16);
    }
  }

  static __device__ void take_keys(RowResults& rows, const PipelineArguments& pipeline, const Lanes& lanes,
                                   int consumer, int stage, unsigned parity, int keys_left) {
    const char *queries = lanes.held(consumer), *keys = lanes.streamed(stage);
    float s[kCells][4], t[kCells][4];
    barrier_wait(lanes.full + stage, parity);
    hand_over(s, t);
    start_logits<T, kStudentSteps>(s, queries, keys);
    start_logits<T, kTeacherSteps>(t, queries + Lanes::kTeacherOffset, keys + Lanes::kTeacherOffset);
    finish_product<1>(s);
    meanwhile([&] {
      rows.template take_student<std::is_same_v<T, __nv_bfloat16>>(s, pipeline.student.scale_log2, keys_left);
    });
    finish_product<0>(t);
    release(lanes.empty + stage);
    if (keys_left <= kTileRows) release(lanes.held_empty + consumer);
    rows.take_teacher(t, s, pipeline.teacher.scale_log2, keys_left);
  }
};

struct NothingExtra {
  __device__ void prepare(const Place&, int) {}
  __device__ void write(void*) {}
};

template <typename T, int kStudentSteps, int kTeacherSteps>
__global__ void __launch_bounds__(kBlockThreads<kConsumers>, 1)
    forward_kernel(const __grid_constant__ ForwardArguments arguments) {
  using Kernel = Forward<T, kStudentSteps, kTeacherSteps>;
  const typename Kernel::Lanes lanes;
  lanes.initialise();
  if (threadIdx.x < kConsumers * kWarpgroupSize) {
    take_registers<kConsumerRegisters<kConsumers>>();
    Kernel::consume(arguments, lanes);
  } else {
    release_registers<kProducerRegisters<kConsumers>>();
    if (threadIdx.x < kConsumers * kWarpgroupSize + kWarpSize) lanes.produce(arguments.pipeline, NothingExtra{});
  }
}

template <typename T>
const char* launch_forward(const AttnAlignProblem& problem, const AttnAlignRows& rows, void* stream) {
  return dispatch(problem, [&](auto student_steps, auto teacher_steps) {
    using Lanes = Pipeline<student_steps, teacher_steps, kConsumers>;
    ForwardArguments arguments{};
    const char* error = describe_problem(&arguments.pipeline, problem, /*hold_keys=*/false, Lanes::kRows);
    if (error != nullptr) return error;
    arguments.loss = static_cast<float*>(rows.loss);
    arguments.student_softmax = static_cast<float2*>(rows.student_softmax);
    arguments.teacher_softmax = static_cast<float2*>(rows.teacher_softmax);
    return launch_pieces<Lanes>(forward_kernel<T, student_steps, teacher_steps>, arguments, stream);
  });
}

}  // namespace

bool takes(const AttnAlignProblem& problem) {
  for (const AttnOperand* operand : {&problem.student_q, &problem.student_k, &problem.teacher_q, &problem.teacher_k}) {
    if (!can_map(*operand, problem.batch, problem.heads, problem.tokens)) return false;
  }
  return true;
}

const char* attn_align_loss_forward(const AttnAlignProblem& problem, const AttnAlignRows& rows, void* stream) {
  if (problem.student_q.type == ScalarType::Float16) return launch_forward<__half>(problem, rows, stream);
  return launch_forward<__nv_bfloat16>(problem, rows, stream);
}

}  // namespace haste::cuda::hopper
