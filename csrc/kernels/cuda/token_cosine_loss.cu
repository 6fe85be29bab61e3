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

// Σ s², Σ t² and Σ s·t over one token, of the numbers times a power of 2 each; the same in every lane.
struct Sums {
  float ss = 0.f, tt = 0.f, st = 0.f;

  template <typename S, typename T>
  __device__ Sums(const S* student, const T* teacher, const Arguments<S, T>& arguments, float student_scale,
                  float teacher_scale) {
#pragma unroll 2
    for (int column = threadIdx.x % kWarpSize * kVector; column < arguments.dim; column += kWarpSize * kVector) {
      float s[kVector], t[kVector];
      load(s, student + column, arguments.dim - column, arguments.student.aligned);
      load(t, teacher + column, arguments.dim - column, arguments.teacher.aligned);
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const float x = s[i] * student_scale, y = t[i] * teacher_scale;
        ss = fmaf(x, x, ss);
        tt = fmaf(y, y, tt);
        st = fmaf(x, y, st);
      }
    }
    ss = reduce_sum<kWarpSize>(ss);
    tt = reduce_sum<kWarpSize>(tt);
    st = reduce_sum<kWarpSize>(st);
  }
};

// Cosine and norms of one token, the same in every lane. Numbers beyond 1e19 have squares beyond float, and a norm that
// may lie beyond it too: their token is summed a second time in smaller units, and norms stay in those.
struct Cosine {
  float student_scale = 1.f, teacher_scale = 1.f;  // 1 / unit
  float student_norm, teacher_norm;                // in units, clamped
  float value;
  bool clamped;  // the student's norm was

  template <typename S, typename T>
  __device__ Cosine(const S* student, const T* teacher, const Arguments<S, T>& arguments) {
    constexpr float kLargest = 3.402823466e38f, kSmaller = 0x1p-72f;
    Sums sums(student, teacher, arguments, 1.f, 1.f);
    if (!(sums.ss <= kLargest && sums.tt <= kLargest)) {
      student_scale = sums.ss <= kLargest ? 1.f : kSmaller;
      teacher_scale = sums.tt <= kLargest ? 1.f : kSmaller;
      sums = Sums(student, teacher, arguments, student_scale, teacher_scale);
    }
    const float norm = sqrtf(sums.ss), other = sqrtf(sums.tt);
    clamped = norm < kSmallestNorm;
    student_norm = clamped ? kSmallestNorm : norm;
    teacher_norm = other < kSmallestNorm ? kSmallestNorm : other;
    value = sums.st / student_norm / teacher_norm;
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
    backward_kernel(Arguments<S, T> arguments, TokenGradient grad_out, S* gradient, bool gradient_aligned) {
  const int64_t token = token_of_warp();
  if (token >= arguments.tokens) return;
  const S* student = arguments.student.row(token, arguments.inner);
  const T* teacher = arguments.teacher.row(token, arguments.inner);
  const Cosine cosine(student, teacher, arguments);
  const float* gradients = static_cast<const float*>(grad_out.data);
  const float g =
      gradients[token / arguments.inner * grad_out.stride_outer + token % arguments.inner * grad_out.stride_inner];
  const float factor = -g / cosine.student_norm * cosine.student_scale;
  const float teacher_factor = 1.f / cosine.teacher_norm;
  const float student_factor = cosine.clamped ? 0.f : -cosine.value / cosine.student_norm;
#pragma unroll 2
  for (int column = threadIdx.x % kWarpSize * kVector; column < arguments.dim; column += kWarpSize * kVector) {
    float s[kVector], t[kVector];
    load(s, student + column, arguments.dim - column, arguments.student.aligned);
    load(t, teacher + column, arguments.dim - column, arguments.teacher.aligned);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const float x = s[i] * cosine.student_scale, y = t[i] * cosine.teacher_scale;
      s[i] = factor * fmaf(teacher_factor, y, student_factor * x);
    }
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
const char* launch_backward(const Arguments<S, T>& arguments, unsigned blocks, const TokenGradient& grad_out,
                            void* gradient, void* stream) {
  const bool aligned = aligned_16(gradient) && arguments.dim % kVector == 0;
  return launch(backward_kernel<S, T>, dim3(blocks), kBlockThreads, 0, stream, arguments, grad_out,
                static_cast<S*>(gradient), aligned);
}

}  // namespace

const char* token_cosine_loss_forward(const TokenCosineProblem& problem, float* loss, void* stream) {
  return dispatch(
      problem, [&](const auto& arguments, unsigned blocks) { return launch_forward(arguments, blocks, loss, stream); });
}

const char* token_cosine_loss_backward(const TokenCosineProblem& problem, const TokenGradient& grad_out,
                                       void* student_gradient, void* stream) {
  return dispatch(problem, [&](const auto& arguments, unsigned blocks) {
    return launch_backward(arguments, blocks, grad_out, student_gradient, stream);
  });
}

}  // namespace haste::cuda
