// token_cosine_loss: one warp per token, 8 elements per lane and step. Bound by memory: the forward reads both
// operands once; the backward reads them twice, the second time from the cache, and writes the gradient.
#include "../token_cosine_loss.h"

#include "element_type.cuh"
#include "vector.cuh"

namespace haste::cuda {
namespace {

constexpr int kBlockThreads = 256;
constexpr int kTokensPerBlock = kBlockThreads / kWarpSize;
constexpr float kSmallestNorm = 1e-12f;  // as torch.nn.functional.normalize

template <typename T>
struct Rows {
  const T* data;
  int64_t stride_outer, stride_inner;
  bool aligned;  // every vector of 8 starts at a multiple of 16 bytes

  __device__ const T* row(int64_t token, int64_t inner) const {
    return data + token / inner * stride_outer + token % inner * stride_inner;
  }
};

template <typename S, typename T>
struct Arguments {
  int64_t tokens, inner;
  int dim;
  Rows<S> student;
  Rows<T> teacher;
};

// Sums over one token, the same in every lane.
struct Cosine {
  float student_norm, teacher_norm;  // clamped
  float value;
  bool clamped;  // the student's norm was

  template <typename S, typename T>
  __device__ Cosine(const S* student, const T* teacher, const Arguments<S, T>& arguments) {
    float ss = 0.f, tt = 0.f, st = 0.f;
#pragma unroll 2
    for (int column = threadIdx.x % kWarpSize * kVector; column < arguments.dim; column += kWarpSize * kVector) {
      float s[kVector], t[kVector];
      load(s, student + column, arguments.dim - column, arguments.student.aligned);
      load(t, teacher + column, arguments.dim - column, arguments.teacher.aligned);
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        ss = fmaf(s[i], s[i], ss);
        tt = fmaf(t[i], t[i], tt);
        st = fmaf(s[i], t[i], st);
      }
    }
    const float norm = sqrtf(reduce_sum<kWarpSize>(ss));
    clamped = norm < kSmallestNorm;
    student_norm = clamped ? kSmallestNorm : norm;
    const float other = sqrtf(reduce_sum<kWarpSize>(tt));
    teacher_norm = other < kSmallestNorm ? kSmallestNorm : other;
    value = reduce_sum<kWarpSize>(st) / student_norm / teacher_norm;
  }
};

__device__ inline int64_t token_of_warp() {
  return static_cast<int64_t>(blockIdx.x) * kTokensPerBlock + threadIdx.x / kWarpSize;
}

template <typename S, typename T>
__global__ void __launch_bounds__(kBlockThreads) forward_kernel(Arguments<S, T> arguments, float* loss) {
  const int64_t token = token_of_warp();
  if (token >= arguments.tokens) return;
  const Cosine cosine(arguments.student.row(token, arguments.inner), arguments.teacher.row(token, arguments.inner),
                      arguments);
  if (threadIdx.x % kWarpSize == 0) loss[token] = -cosine.value;
}

template <typename S, typename T>
__global__ void __launch_bounds__(kBlockThreads)
    backward_kernel(Arguments<S, T> arguments, TokenGradient upstream, S* gradient, bool gradient_aligned) {
  const int64_t token = token_of_warp();
  if (token >= arguments.tokens) return;
  const S* student = arguments.student.row(token, arguments.inner);
  const T* teacher = arguments.teacher.row(token, arguments.inner);
  const Cosine cosine(student, teacher, arguments);
  const float g = static_cast<const float*>(upstream.data)[token / arguments.inner * upstream.stride_outer +
                                                           token % arguments.inner * upstream.stride_inner];
  const float factor = -g / cosine.student_norm;
  const float teacher_factor = factor / cosine.teacher_norm;
  const float student_factor = cosine.clamped ? 0.f : -factor * cosine.value / cosine.student_norm;
#pragma unroll 2
  for (int column = threadIdx.x % kWarpSize * kVector; column < arguments.dim; column += kWarpSize * kVector) {
    float s[kVector], t[kVector];
    load(s, student + column, arguments.dim - column, arguments.student.aligned);
    load(t, teacher + column, arguments.dim - column, arguments.teacher.aligned);
#pragma unroll
    for (int i = 0; i < kVector; ++i) s[i] = fmaf(teacher_factor, t[i], student_factor * s[i]);
    store(gradient + token * arguments.dim + column, s, arguments.dim - column, gradient_aligned);
  }
}

template <typename T>
Rows<T> describe(const TokenCosineProblem& problem, const TokenOperand& operand) {
  const bool aligned = aligned_16(operand.data) && problem.dim % kVector == 0 &&
                       stride_aligned_16(problem.outer, operand.stride_outer, sizeof(T)) &&
                       stride_aligned_16(problem.inner, operand.stride_inner, sizeof(T));
  return {static_cast<const T*>(operand.data), operand.stride_outer, operand.stride_inner, aligned};
}

// Calls run(arguments, blocks) with the arguments for the problem's types, unless there is nothing to do.
template <typename Run>
const char* dispatch(const TokenCosineProblem& problem, const Run& run) {
  const int64_t tokens = problem.outer * problem.inner;
  const int64_t blocks = ceil_div(tokens, kTokensPerBlock);
  if (tokens == 0) return nullptr;
  if (!fits_int(blocks) || !fits_int(problem.dim)) {
    return "token_cosine_loss on CUDA takes fewer than 2^31 blocks of 8 tokens, and dims below 2^31";
  }
  return dispatch_type(problem.student.type, [&](auto student) {
    return dispatch_type(problem.teacher.type, [&](auto teacher) {
      using S = decltype(student);
      using T = decltype(teacher);
      const Arguments<S, T> arguments{tokens, problem.inner, static_cast<int>(problem.dim),
                                      describe<S>(problem, problem.student), describe<T>(problem, problem.teacher)};
      return run(arguments, static_cast<unsigned>(blocks));
    });
  });
}

template <typename S, typename T>
const char* launch_forward(const Arguments<S, T>& arguments, unsigned blocks, float* loss, void* stream) {
  return launch(forward_kernel<S, T>, dim3(blocks), kBlockThreads, 0, stream, arguments, loss);
}

template <typename S, typename T>
const char* launch_backward(const Arguments<S, T>& arguments, unsigned blocks, const TokenGradient& upstream,
                            void* gradient, void* stream) {
  const bool aligned = aligned_16(gradient) && arguments.dim % kVector == 0;
  return launch(backward_kernel<S, T>, dim3(blocks), kBlockThreads, 0, stream, arguments, upstream,
                static_cast<S*>(gradient), aligned);
}

}  // namespace

const char* token_cosine_loss_forward(const TokenCosineProblem& problem, float* loss, void* stream) {
  return dispatch(problem, [&](const auto& arguments, unsigned blocks) {
    return launch_forward(arguments, blocks, loss, stream);
  });
}

const char* token_cosine_loss_backward(const TokenCosineProblem& problem, const TokenGradient& upstream,
                                       void* student_gradient, void* stream) {
  return dispatch(problem, [&](const auto& arguments, unsigned blocks) {
    return launch_backward(arguments, blocks, upstream, student_gradient, stream);
  });
}

}  // namespace haste::cuda
