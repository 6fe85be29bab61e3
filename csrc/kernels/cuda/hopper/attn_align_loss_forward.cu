// attn_align_loss on Hopper, forward. Per row, online over tiles of keys, in powers of 2:
//   m_s, l_s = max and Σ 2^(s − m_s);  m_t, l_t the same of t
//   cross-entropy: x = Σ 2^(t − m_t)·(s − m_s),                loss = log2 l_s − x / l_t
//   divergence:    x = Σ 2^(t − m_t)·((t − m_t) − (s − m_s)),  loss = log2 l_s − log2 l_t + x / l_t
// Measuring logits from their maxima keeps the digits that lse_s − Σ softmax(t)·s would cancel; of a student like its
// teacher every term of a divergence is 0. A distance s − m_s is one fused multiply-add of the product itself, so it is
// rounded once; backward forms the same distance from the same maximum. That of the maximum itself is then not 0 but
// the rounding of m_s, of which the quotients by l know nothing.
//
// Each consumer starts both products of a tile and works on s while the tensor cores form t. A tile is *plain* if all
// of its columns are keys and no scale is negative; what else can occur, logits beyond a fused distance and products
// beyond float, is found by a vote of the warp and done again.
#include "../attn_align_infinity.cuh"
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
  AttnOperand student_q, student_k, teacher_q, teacher_k;  // for a second look at a row
  float* loss;
  float2 *student_softmax, *teacher_softmax;  // {m, 1 / l} per row
};

// The largest logit of one of the lane's two rows in a tile. A negative scale makes it the smallest product.
template <bool kPlain>
__device__ inline float largest_logit(const float (&dots)[kCells][4], int half, float scale) {
  float extreme = dots[0][2 * half];
  if (!kPlain && scale < 0.f) {
#pragma unroll
    for (const auto& cell : dots) extreme = fminf(extreme, fminf(cell[2 * half], cell[2 * half + 1]));
  } else {
#pragma unroll
    for (const auto& cell : dots) extreme = fmaxf(extreme, fmaxf(cell[2 * half], cell[2 * half + 1]));
  }
  return reduce_max<4>(extreme * scale);
}

// Of one model, where this (batch, head) lies.
template <typename T>
__device__ QueriesAndKeys<T> operands_of(const AttnOperand& q, const AttnOperand& k, const Place& place) {
  const auto begin = [&](const AttnOperand& x) {
    return static_cast<const T*>(x.data) + place.batch * x.stride_batch + place.head * x.stride_head;
  };
  return {begin(q), begin(k), q.stride_token, k.stride_token, static_cast<int>(q.dim)};
}

// Running maximum and sum of one model's two rows of a lane (lane/4 and lane/4 + 8). The maximum is that of the whole
// row, the sum that of the lane's own columns until the end. It begins with the lowest that a logit is held to: then it
// rises from there by a finite number, which an empty sum makes 0.
struct OnlineSoftmax {
  float maximum[2] = {-kLargestLogit, -kLargestLogit};
  float sum[2] = {0.f, 0.f};

  // Turns a tile of products into the logits' distances from the new maximum. Gives how far the maximum has risen, and
  // the factor by which what was summed before must shrink. Columns past the last key are as far away as can be: their
  // power of 2 is 0, and 0 times a finite number is 0, not NaN.
  template <bool kPlain>
  __device__ void update(float (&dots)[kCells][4], float scale, int keys_left, float (&max_delta)[2],
                         float (&correction)[2]) {
    if (!kPlain && keys_left < kTileRows) hide_columns(dots, keys_left, scale < 0.f ? kLargest : -kLargest);
    float higher[2];
    bool large = false;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      higher[half] = fmaxf(maximum[half], largest_logit<kPlain>(dots, half, scale));
      large |= fabsf(higher[half]) > kLargestPlainLogit;
    }
    if (__any_sync(kFullWarp, large)) {
      take_large_distances(dots, scale, higher);
    } else {
#pragma unroll
      for (auto& cell : dots) {
#pragma unroll
        for (int i = 0; i < 4; ++i) cell[i] = fmaf(cell[i], scale, -higher[i / 2]);
      }
    }
    if (!kPlain && keys_left < kTileRows) hide_columns(dots, keys_left, -kLargest);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      max_delta[half] = higher[half] - maximum[half];
      correction[half] = fast_exp2(-max_delta[half]);
      maximum[half] = higher[half];
    }
  }

  // Where the maximum is so large that its own distance must be 0, however much rounding takes.
  static __device__ void take_large_distances(float (&dots)[kCells][4], float scale, float (&maximum)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const bool fused = fabsf(maximum[half]) <= kLargestPlainLogit;
      maximum[half] = fminf(maximum[half], kLargestLogit);
#pragma unroll
      for (auto& cell : dots) {
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          const float rounded = clamp(__fmul_rn(cell[i], scale), kLargestLogit) - maximum[half];
          cell[i] = fused ? fmaf(cell[i], scale, -maximum[half]) : rounded;
        }
      }
    }
  }
};

// The row results of one consumer's 64 rows, tile by tile.
template <typename T, bool kDivergence>
struct RowResults {
  static constexpr bool kMayOverflow = std::is_same_v<T, __nv_bfloat16>;
  OnlineSoftmax student, teacher;
  float x[2] = {0.f, 0.f};

  template <bool kPlain>
  __device__ void take_student(float (&s)[kCells][4], float scale, int keys_left) {
    float max_delta[2], correction[2];
    student.update<kPlain>(s, scale, keys_left, max_delta, correction);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      student.sum[half] *= correction[half];
      x[half] = fmaf(kDivergence ? teacher.sum[half] : -teacher.sum[half], max_delta[half], x[half]);
#pragma unroll
      for (const auto& cell : s) {
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) student.sum[half] += fast_exp2(cell[i]);
      }
    }
  }

  // `s`: what take_student left of it.
  template <bool kPlain>
  __device__ void take_teacher(float (&t)[kCells][4], const float (&s)[kCells][4], float scale, int keys_left) {
    float max_delta[2], correction[2], before[2];
    teacher.update<kPlain>(t, scale, keys_left, max_delta, correction);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (kDivergence) x[half] = fmaf(-teacher.sum[half], max_delta[half], x[half]);
      teacher.sum[half] *= correction[half];
      before[half] = x[half] *= correction[half];
#pragma unroll
      for (int cell = 0; cell < kCells; ++cell) {
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          const float power = fast_exp2(t[cell][i]);
          teacher.sum[half] += power;
          x[half] = fmaf(power, kDivergence ? t[cell][i] - s[cell][i] : s[cell][i], x[half]);
        }
      }
    }
    if (kMayOverflow && __any_sync(kFullWarp, x[0] != x[0] || x[1] != x[1])) take_infinite(t, s, before);
  }

  // A product of −∞ has met a power of 0. If it was NaN, a sum is NaN, too.
  __device__ void take_infinite(const float (&t)[kCells][4], const float (&s)[kCells][4], const float (&before)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      x[half] = before[half];
#pragma unroll
      for (int cell = 0; cell < kCells; ++cell) {
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          const float of_student = fmaxf(s[cell][i], -kLargest), of_teacher = fmaxf(t[cell][i], -kLargest);
          x[half] = fmaf(fast_exp2(of_teacher), kDivergence ? of_teacher - of_student : of_student, x[half]);
        }
      }
    }
  }

  __device__ void store(const ForwardArguments& arguments, const Place& place, int first_row) const {
    const int lane = threadIdx.x % kWarpSize;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float student_sum = reduce_sum<4>(student.sum[half]);
      float teacher_sum = reduce_sum<4>(teacher.sum[half]);
      const float x_sum = reduce_sum<4>(x[half]);
      const int row = first_row + lane / 4 + 8 * half;
      const RowOutcome outcome{student.maximum[half], teacher.maximum[half], student_sum, teacher_sum, x_sum};
      const bool suspicious = row < place.end_row && outcome.hints_at_infinity(kLargestLogit);
      if (__any_sync(kFullWarp, suspicious)) {
        bool finite = true;
        if (suspicious) {
          const int keys = arguments.pipeline.tokens;
          finite = operands_of<T>(arguments.student_q, arguments.student_k, place).are_finite(row, keys) &
                   operands_of<T>(arguments.teacher_q, arguments.teacher_k, place).are_finite(row, keys);
        }
        if (reduce_max<4>(finite ? 0.f : 1.f) > 0.f) student_sum = teacher_sum = NAN;
      }
      if (lane % 4 != 0 || row >= place.end_row) continue;
      const int64_t index = place.first_of_head + row;
      const float mean = x_sum / teacher_sum;
      const float loss = kLn2 * (log2f(student_sum) + (kDivergence ? mean - log2f(teacher_sum) : -mean));
      arguments.loss[index] = arguments.pipeline.tokens == 1 ? 0.f * loss : loss;  // exactly, whatever exp2 rounds
      arguments.student_softmax[index] = {student.maximum[half], 1.f / student_sum};
      arguments.teacher_softmax[index] = {teacher.maximum[half], 1.f / teacher_sum};
    }
  }
};

template <typename T, int kStudentSteps, int kTeacherSteps, bool kDivergence>
struct Forward {
  using Lanes = Pipeline<kStudentSteps, kTeacherSteps, kConsumers>;
  using Rows = RowResults<T, kDivergence>;

  static __device__ void consume(const ForwardArguments& arguments, const Lanes& lanes) {
    const PipelineArguments& pipeline = arguments.pipeline;
    const int warp = warp_index(), consumer = warp / kWarpgroupWarps;
    const bool signless = pipeline.student.scale_log2 >= 0.f && pipeline.teacher.scale_log2 >= 0.f;
    typename Lanes::Position ring;
    unsigned held_parity = 0;
    for (int round = 0, work_tile; (work_tile = work_tile_of_round(round)) < pipeline.work_tiles; ++round) {
      const Place place(pipeline, work_tile);
      if (place.first_row + consumer * kTileRows >= place.end_row) {
        lanes.pass(pipeline, ring);
        continue;
      }
      Rows rows;
      barrier_wait(lanes.held_full + consumer, held_parity);
      held_parity ^= 1;
      for (int keys_left = pipeline.tokens; keys_left > 0; keys_left -= kTileRows) {
        take_keys(rows, pipeline, lanes, consumer, ring, keys_left, signless && keys_left >= kTileRows);
        ring.advance();
      }
      rows.store(arguments, place, place.first_row + warp * 16);
    }
  }

  // Without a branch around it the assembler moves most of the work on s behind the wait for t.
  static __device__ void take_keys(Rows& rows, const PipelineArguments& pipeline, const Lanes& lanes, int consumer,
                                   const typename Lanes::Position& ring, int keys_left, bool plain) {
    const char *queries = lanes.held(consumer), *keys = lanes.streamed(ring.stage);
    float s[kCells][4], t[kCells][4];
    barrier_wait(lanes.full + ring.stage, ring.parity);
    hand_over(s, t);
    start_logits<T, kStudentSteps>(s, queries, keys);
    start_logits<T, kTeacherSteps>(t, queries + Lanes::kTeacherOffset, keys + Lanes::kTeacherOffset);
    finish_product<1>(s);
    if (plain) {
      rows.template take_student<true>(s, pipeline.student.scale_log2, keys_left);
    } else {
      rows.template take_student<false>(s, pipeline.student.scale_log2, keys_left);
    }
    __syncwarp();  // what waits for products needs the whole warp
    finish_product<0>(t);
    release(lanes.empty + ring.stage);
    if (keys_left <= kTileRows) release(lanes.held_empty + consumer);
    if (plain) {
      rows.template take_teacher<true>(t, s, pipeline.teacher.scale_log2, keys_left);
    } else {
      rows.template take_teacher<false>(t, s, pipeline.teacher.scale_log2, keys_left);
    }
  }
};

struct NothingExtra {
  __device__ void prepare(const Place&, int) {}
  __device__ void write(void*) {}
};

template <typename T, int kStudentSteps, int kTeacherSteps, bool kDivergence>
__global__ void __launch_bounds__(kBlockThreads<kConsumers>, 1)
    forward_kernel(const __grid_constant__ ForwardArguments arguments) {
  using Kernel = Forward<T, kStudentSteps, kTeacherSteps, kDivergence>;
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
    arguments.student_q = problem.student_q, arguments.student_k = problem.student_k;
    arguments.teacher_q = problem.teacher_q, arguments.teacher_k = problem.teacher_k;
    arguments.loss = static_cast<float*>(rows.loss);
    arguments.student_softmax = static_cast<float2*>(rows.student_softmax);
    arguments.teacher_softmax = static_cast<float2*>(rows.teacher_softmax);
    const auto kernel = problem.kl ? forward_kernel<T, student_steps, teacher_steps, true>
                                   : forward_kernel<T, student_steps, teacher_steps, false>;
    return launch_work_tiles<Lanes>(kernel, arguments, stream);
  });
}

}  // namespace

bool supports(const AttnAlignProblem& problem) {
  if (problem.causal > 0) return false;
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
