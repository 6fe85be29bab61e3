// attn_align_loss on emulated AMX as a library of its own: the sources of the package, dealt out as there, with C
// functions in front. The fallback for what AMX does not take is the AVX-512 kernel, as in the package.
#include "kernels/attn_align_loss.h"

#include "kernels/cpu/isa/kernels.h"

namespace haste::cpu {

const Kernels& active_kernels() {
  static constexpr Kernels kernels = {amx::attn_align_loss_scratch,
                                      amx::attn_align_loss_forward,
                                      amx::attn_align_loss_backward,
                                      nullptr,
                                      nullptr,
                                      nullptr};
  return kernels;
}

}  // namespace haste::cpu

namespace {

// As if `pieces` threads divided the work; they run one after the other.
haste::ParallelFor divided_by(int64_t pieces) {
  return [pieces](int64_t count, const haste::RangeBody& body) {
    for (int64_t i = 0; i < pieces; ++i) {
      const int64_t begin = count * i / pieces, end = count * (i + 1) / pieces;
      if (begin < end) body(begin, end);
    }
  };
}

}  // namespace

extern "C" {
void forward(const haste::AttnAlignProblem* problem, const haste::AttnAlignRows* rows, int64_t pieces) {
  haste::cpu::attn_align_loss_forward(*problem, *rows, divided_by(pieces));
}
void backward(const haste::AttnAlignProblem* problem, const haste::AttnAlignBackward* gradient, int64_t pieces) {
  haste::cpu::attn_align_loss_backward(*problem, *gradient, divided_by(pieces));
}
}
