#include "attn_align_loss_backward.cuh"

namespace haste::cuda {
template const char* launch_gradients<float>(const AttnAlignProblem&, const AttnAlignBackward&, void*);
}  // namespace haste::cuda
