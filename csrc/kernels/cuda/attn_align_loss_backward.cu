// attn_align_loss, backward: the entry. The kernels are in attn_align_loss_backward.cuh.
#include "attn_align_tiles.cuh"
#include "hopper/attn_align_hopper.h"
#include "paths.h"

namespace haste::cuda {

// Each element type in a file of its own (attn_align_loss_backward_<type>.cu), so that they compile side by side.
template <typename T>
const char* launch_gradients(const AttnAlignProblem& problem, const AttnAlignBackward& backward, void* stream);
extern template const char* launch_gradients<float>(const AttnAlignProblem&, const AttnAlignBackward&, void*);
extern template const char* launch_gradients<__half>(const AttnAlignProblem&, const AttnAlignBackward&, void*);
extern template const char* launch_gradients<__nv_bfloat16>(const AttnAlignProblem&, const AttnAlignBackward&, void*);

const char* attn_align_loss_backward(const AttnAlignProblem& problem, const AttnAlignBackward& backward,
                                     void* stream) {
  if (const char* reason = refusal(problem)) return reason;
  if (count_blocks(problem) == 0) return nullptr;
  bool on_hopper = false;
  if (const char* reason = choose_path(&on_hopper)) return reason;
#ifdef HASTE_HAS_HOPPER
  if (on_hopper && hopper::takes(problem)) return hopper::attn_align_loss_backward(problem, backward, stream);
#endif
  return dispatch_type(problem.student_q.type, [&](auto element) {
    return launch_gradients<decltype(element)>(problem, backward, stream);
  });
}

}  // namespace haste::cuda
