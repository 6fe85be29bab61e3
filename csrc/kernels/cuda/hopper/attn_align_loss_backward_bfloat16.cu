#include "attn_align_loss_backward.cuh"

namespace haste::cuda::hopper {
template const char* launch_gradients<__nv_bfloat16>(const AttnAlignProblem&, const AttnAlignBackward&, void*);
}  // namespace haste::cuda::hopper
