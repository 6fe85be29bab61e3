// attn_align_loss on Hopper, backward: the entry. Its kernels are in attn_align_loss_backward_kernels.cu, each element
// type a unit of its own, so that they compile side by side.
#include "../arch.cuh"
#include "attn_align_hopper.h"

namespace haste::cuda::hopper {

template <typename T>
const char* launch_gradients(const AttnAlignProblem& problem, const AttnAlignBackward& backward, void* stream);

const char* attn_align_loss_backward(const AttnAlignProblem& problem, const AttnAlignBackward& backward, void* stream) {
  if (problem.student_q.type == ScalarType::Float16) return launch_gradients<__half>(problem, backward, stream);
  return launch_gradients<__nv_bfloat16>(problem, backward, stream);
}

}  // namespace haste::cuda::hopper
