// attn_align_loss on emulated AMX as a library of its own: the sources of the package, shared out as there, with C
// functions in front. The fallback for what AMX does not take is the AVX-512 kernel, as in the package.
#include "kernels/attn_align_loss.h"

#include "kernels/cpu/isa/kernels.h"

namespace haste::cpu {

const Kernels& active_kernels(bool in_double) {
  static const Kernels of_float{amx::attn_align_loss<float>(), {}, {}};
  static const Kernels of_double{avx512::attn_align_loss<double>(), {}, {}};
  return in_double ? of_double : of_float;
}

}  // namespace haste::cpu

namespace {

// As if so many `threads` divided the work; they run one after the other.
haste::ParallelFor divided_by(int64_t threads) {
  return [threads](int64_t count, const haste::RangeBody& body) {
    for (int64_t i = 0; i < threads; ++i) {
      const int64_t begin = count * i / threads, end = count * (i + 1) / threads;
      if (begin < end) body(begin, end);
    }
  };
}

}  // namespace

extern "C" {
void forward(const haste::AttnAlignProblem* problem, const haste::AttnAlignRows* rows, int64_t threads) {
  haste::cpu::attn_align_loss_forward(*problem, *rows, divided_by(threads));
}
void backward(const haste::AttnAlignProblem* problem, const haste::AttnAlignBackward* gradient, int64_t threads) {
  haste::cpu::attn_align_loss_backward(*problem, *gradient, divided_by(threads));
}
}
