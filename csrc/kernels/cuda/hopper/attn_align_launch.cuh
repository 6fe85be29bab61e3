// Host side of the Hopper kernels: tensor maps, the choice of a kernel by head dims, the launch.
#pragma once

#include <algorithm>
#include <type_traits>

#include "attn_align_pipeline.cuh"

namespace haste::cuda::hopper {

inline const char* describe_model(Model* model, const AttnAlignProblem& problem, const AttnOperand& held,
                                  const AttnOperand& streamed, double scale) {
  constexpr double kLog2E = 1.4426950408889634;
  model->scale_log2 = static_cast<float>(scale * kLog2E);
  const char* error = describe(&model->held, held, problem.batch, problem.heads, problem.tokens, kTileRows);
  if (error != nullptr) return error;
  return describe(&model->streamed, streamed, problem.batch, problem.heads, problem.tokens, kTileRows);
}

// `rows`: that a block holds at a time.
inline const char* describe_problem(PipelineArguments* arguments, const AttnAlignProblem& problem, bool hold_keys,
                                    int rows) {
  arguments->heads = static_cast<int>(problem.heads);
  arguments->tokens = static_cast<int>(problem.tokens);
  arguments->row_blocks = static_cast<int>(ceil_div(problem.tokens, rows));
  arguments->work_tiles = static_cast<int>(problem.batch * problem.heads) * arguments->row_blocks;
  const auto describe_side = [&](Model* model, const AttnOperand& q, const AttnOperand& k, double scale) {
    return hold_keys ? describe_model(model, problem, k, q, scale) : describe_model(model, problem, q, k, scale);
  };
  const char* error = describe_side(&arguments->student, problem.student_q, problem.student_k, problem.student_scale);
  if (error != nullptr) return error;
  return describe_side(&arguments->teacher, problem.teacher_q, problem.teacher_k, problem.teacher_scale);
}

// As many blocks as there are multiprocessors: one fills each.
template <typename Pipeline, typename Arguments>
const char* launch_work_tiles(void (*kernel)(Arguments), const Arguments& arguments, void* stream) {
  int device = 0, multiprocessors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  }
  if (error != cudaSuccess) return cudaGetErrorString(error);
  return launch(kernel, dim3(std::min(arguments.pipeline.work_tiles, multiprocessors)), Pipeline::kThreads,
                Pipeline::kSharedBytes, stream, arguments);
}

// Returns run(student steps, teacher steps), integral constants: those of the head dims in use, 64 and 72, and for
// every other dim those of 64 or 128.
template <typename Run>
const char* dispatch(const AttnAlignProblem& problem, const Run& run) {
  const auto with_teacher = [&](auto student_steps) {
    if (problem.teacher_q.dim <= 64) return run(student_steps, std::integral_constant<int, 4>{});
    return run(student_steps, std::integral_constant<int, 8>{});
  };
  if (problem.student_q.dim <= 64) return with_teacher(std::integral_constant<int, 4>{});
  if (problem.student_q.dim <= 72) return with_teacher(std::integral_constant<int, 5>{});
  return with_teacher(std::integral_constant<int, 8>{});
}

}  // namespace haste::cuda::hopper
