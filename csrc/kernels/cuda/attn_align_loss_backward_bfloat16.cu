#include "attn_align_loss_backward.cuh"

namespace haste::cuda {
template const char* launch_gradients<__nv_bfloat16>(const AttnAlignProblem&, const AttnAlignBackward&, void*);
}  // namespace haste::cuda
