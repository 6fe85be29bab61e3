// attn_align_loss on Hopper, backward: the entry. The kernels are in attn_align_loss_backward.cuh, each element type in
// a file of its own (attn_align_loss_backward_<type>.cu), so that they compile side by side.
#include "../arch.cuh"
#include "attn_align_hopper.h"

namespace haste::cuda::hopper {

template <typename T>
const char* launch_gradients(const AttnAlignProblem& problem, const AttnAlignBackward& backward, void* stream);
extern template const char* launch_gradients<__half>(const AttnAlignProblem&, const AttnAlignBackward&, void*);
extern template const char* launch_gradients<__nv_bfloat16>(const AttnAlignProblem&, const AttnAlignBackward&, void*);

const char* attn_align_loss_backward(const AttnAlignProblem& problem, const AttnAlignBackward& backward,
                                     void* stream) {
  if (problem.student_q.type == ScalarType::Float16) return launch_gradients<__half>(problem, backward, stream);
  return launch_gradients<__nv_bfloat16>(problem, backward, stream);
}

}  // namespace haste::cuda::hopper
