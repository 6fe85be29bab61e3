// attn_align_loss, backward: the entry. Its kernels are in attn_align_loss_backward_kernels.cu.
#include "attn_align_tiles.cuh"
#include "dispatch.h"
#include "hopper/attn_align_hopper.h"

namespace haste::cuda {

// Each element type is a unit of its own, so that they compile side by side.
template <typename T>
const char* launch_gradients(const AttnAlignProblem& problem, const AttnAlignBackward& backward, void* stream);

const char* attn_align_loss_backward(const AttnAlignProblem& problem, const AttnAlignBackward& backward, void* stream) {
  if (const char* reason = refusal(problem)) return reason;
  if (count_blocks(problem) == 0) return nullptr;
  bool on_hopper = false;
  if (const char* reason = choose_kernels(&on_hopper)) return reason;
#ifdef HASTE_HAS_HOPPER
  if (on_hopper && hopper::supports(problem)) return hopper::attn_align_loss_backward(problem, backward, stream);
#endif
  return dispatch_type(problem.student_q.type,
                       [&](auto element) { return launch_gradients<decltype(element)>(problem, backward, stream); });
}

}  // namespace haste::cuda
