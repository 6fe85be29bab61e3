// attn_align_loss, forward: loss and both softmax statistics of 64 query rows per block, without an attention map.
//
// Per row, online over tiles of keys (in powers of 2, so logits carry a factor log2(e)):
//   m_s, l_s = max and Σ 2^(s − m_s);  m_t, l_t the same of t;  x = Σ 2^(t − m_t)·(s − m_s)
//   loss = log2 l_s − x / l_t
// For the divergence (kKl), x = Σ 2^(t − m_t)·((s − m_s) − (t − m_t)) and loss = log2(l_s / l_t) − x / l_t. Measuring a
// logit from its maximum keeps the digits that lse_s − Σ softmax(t)·s would cancel.
#include "attn_align_fragments.cuh"
#include "attn_align_infinity.cuh"
#include "attn_align_tiles.cuh"
#include "dispatch.h"
#include "hopper/attn_align_hopper.h"

namespace haste::cuda {
namespace {

// Half as many keys at a time in fp32, so that head dim 128 fits the 99 KB of the smallest devices.
template <typename T>
constexpr int kKeyTiles = sizeof(T) == 4 ? 4 : 8;

// Running maximum and sum of one model's two rows of a lane (lane/4 and lane/4 + 8). The maximum is that of the
// whole row, the sum that of the lane's own columns until the end.
struct OnlineSoftmax {
  float maximum[2] = {-INFINITY, -INFINITY};
  float sum[2] = {0.f, 0.f};

  // Takes in a tile of logits and leaves their distance from the maximum in their place. Gives 2^distance, how far the
  // maximum has risen, and the factor by which what was summed before must shrink.
  template <int kTiles>
  __device__ void update(float (&logits)[kTiles][4], float (&powers)[kTiles][4], float (&max_delta)[2],
                         float (&correction)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float tile_maximum = maximum[half];
#pragma unroll
      for (const auto& tile : logits) tile_maximum = fmaxf(tile_maximum, fmaxf(tile[2 * half], tile[2 * half + 1]));
      tile_maximum = reduce_max<4>(tile_maximum);
      max_delta[half] = maximum[half] == -INFINITY ? 0.f : tile_maximum - maximum[half];
      correction[half] = fast_exp2(maximum[half] - tile_maximum);
      maximum[half] = tile_maximum;
      sum[half] *= correction[half];
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          logits[tile][i] -= tile_maximum;
          powers[tile][i] = fast_exp2(logits[tile][i]);
          sum[half] += powers[tile][i];
        }
      }
    }
  }
};

constexpr float kLargestLogit = 1e38f;

// Scales logits, holds them to finite numbers, lest ∞ − ∞ make NaN of what was none, and hides the columns past the last
// key that each of the lane's two rows sees. These get a very low number, not −∞: their power of 2 is 0 all the same, and
// 0 times their distance from any maximum is 0, not NaN.
template <typename T, int kTiles>
__device__ void scale_and_mask(float (&logits)[kTiles][4], float scale, const int (&keys_left)[2]) {
  const int column = threadIdx.x % 4 * 2;
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      logits[tile][i] = tile * 8 + column + i % 2 < keys_left[i / 2] ? logits[tile][i] * scale : -kLargestLogit;
      if (!std::is_same_v<T, __half>) logits[tile][i] = clamp(logits[tile][i], kLargestLogit);  // fp16: never larger
    }
  }
}

// Of one model, where the (batch, head) of the block lies.
template <typename T>
__device__ QueriesAndKeys<T> operands_of(const Model<T>& model, const BlockPlace& place) {
  const Operand<T>&q = model.held, &k = model.streamed;
  return {q.data + place.batch * q.stride_batch + place.head * q.stride_head,
          k.data + place.batch * k.stride_batch + place.head * k.stride_head, q.stride_token, k.stride_token,
          model.dim};
}

// 4 blocks on a multiprocessor, by registers: at 128 threads, up to 128 each.
template <typename T, bool kKl>
__global__ void __launch_bounds__(kBlockThreads, 4)
    forward_kernel(AlignArguments<T> arguments, float* loss, float2* student_statistics, float2* teacher_statistics) {
  constexpr int kTiles = kKeyTiles<T>, kKeys = 8 * kTiles;
  const Model<T>&student = arguments.student, &teacher = arguments.teacher;
  const int tokens = arguments.tokens, warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const BlockPlace place(arguments);
  const Tiles<T, kKeys> tiles(arguments);
  const T* student_q = tiles.held_student + warp * 16 * student.shared_stride;
  const T* teacher_q = tiles.held_teacher + warp * 16 * teacher.shared_stride;

  // No query of the block sees a key past those of its last one.
  const int last_query = min(place.first_row + kHeldRows, tokens) - 1, keys = arguments.visible_keys(last_query);
  int keys_left[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    keys_left[half] = arguments.visible_keys(min(place.first_row + warp * 16 + lane / 4 + 8 * half, last_query));
  }

  OnlineSoftmax student_softmax, teacher_softmax;
  float x[2] = {0.f, 0.f};

  copy_tile<kHeldRows>(tiles.held_student, student, student.held, place, place.first_row, tokens);
  copy_tile<kHeldRows>(tiles.held_teacher, teacher, teacher.held, place, place.first_row, tokens);
  copy_tile<kKeys>(tiles.streamed_student, student, student.streamed, place, 0, tokens);
  for (int key = 0; key < keys; key += kKeys) {
    float powers[kTiles][4], max_delta[2], correction[2];

    wait_for_copies();
    __syncthreads();  // the student's keys are here, and nobody reads the teacher's any more
    copy_tile<kKeys>(tiles.streamed_teacher, teacher, teacher.streamed, place, key, tokens);
    float s[kTiles][4];
    Fragments<T>::logits(s, student_q, tiles.streamed_student, student.shared_stride, student.padded_dim);
    scale_and_mask<T>(s, student.scale_log2, keys_left);
    student_softmax.update(s, powers, max_delta, correction);
#pragma unroll
    for (int half = 0; half < 2; ++half) x[half] -= teacher_softmax.sum[half] * max_delta[half];

    wait_for_copies();
    __syncthreads();  // the teacher's keys are here, and nobody reads the student's any more
    if (key + kKeys < keys) {
      copy_tile<kKeys>(tiles.streamed_student, student, student.streamed, place, key + kKeys, tokens);
    }
    float t[kTiles][4];
    Fragments<T>::logits(t, teacher_q, tiles.streamed_teacher, teacher.shared_stride, teacher.padded_dim);
    scale_and_mask<T>(t, teacher.scale_log2, keys_left);
    const float before[2] = {teacher_softmax.sum[0], teacher_softmax.sum[1]};
    teacher_softmax.update(t, powers, max_delta, correction);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (kKl) x[half] += before[half] * max_delta[half];
      x[half] *= correction[half];
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          x[half] = fmaf(powers[tile][i], kKl ? s[tile][i] - t[tile][i] : s[tile][i], x[half]);
        }
      }
      keys_left[half] -= kKeys;
    }
  }

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float student_sum = reduce_sum<4>(student_softmax.sum[half]);
    float teacher_sum = reduce_sum<4>(teacher_softmax.sum[half]);
    const float x_sum = reduce_sum<4>(x[half]);
    const int row = place.first_row + warp * 16 + lane / 4 + 8 * half;
    const RowOutcome outcome{student_softmax.maximum[half], teacher_softmax.maximum[half], student_sum, teacher_sum,
                             x_sum};
    const bool suspicious = row < tokens && outcome.hints_at_infinity(kLargestLogit);
    if (__any_sync(kFullWarp, suspicious)) {
      bool finite = true;
      if (suspicious) {
        const int keys_seen = arguments.visible_keys(row);
        finite = operands_of(student, place).are_finite(row, keys_seen) &
                 operands_of(teacher, place).are_finite(row, keys_seen);
      }
      if (reduce_max<4>(finite ? 0.f : 1.f) > 0.f) student_sum = teacher_sum = NAN;
    }
    if (lane % 4 == 0 && row < tokens) {
      const float sums = kKl ? student_sum / teacher_sum : student_sum;
      loss[place.first_of_head + row] = kLn2 * (log2f(sums) - x_sum / teacher_sum);
      student_statistics[place.first_of_head + row] = make_float2(student_softmax.maximum[half], 1.f / student_sum);
      teacher_statistics[place.first_of_head + row] = make_float2(teacher_softmax.maximum[half], 1.f / teacher_sum);
    }
  }
}

}  // namespace

const char* attn_align_loss_forward(const AttnAlignProblem& problem, const AttnAlignRows& rows, void* stream) {
  if (const char* reason = refusal(problem)) return reason;
  const int64_t blocks = count_blocks(problem);
  if (blocks == 0) return nullptr;
  bool on_hopper = false;
  if (const char* reason = choose_kernels(&on_hopper)) return reason;
#ifdef HASTE_HAS_HOPPER
  if (on_hopper && hopper::supports(problem)) return hopper::attn_align_loss_forward(problem, rows, stream);
#endif
  return dispatch_type(problem.student_q.type, [&](auto element) {
    using T = decltype(element);
    const auto arguments = describe<T>(problem, /*hold_keys=*/false);
    return launch(problem.kl ? forward_kernel<T, true> : forward_kernel<T, false>, dim3(static_cast<unsigned>(blocks)),
                  kBlockThreads, arguments.template tile_bytes<8 * kKeyTiles<T>>(), stream, arguments,
                  static_cast<float*>(rows.loss), static_cast<float2*>(rows.student_softmax),
                  static_cast<float2*>(rows.teacher_softmax));
  });
}

}  // namespace haste::cuda
