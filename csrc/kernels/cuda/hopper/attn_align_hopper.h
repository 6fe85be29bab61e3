// The Hopper kernels of attn_align_loss, for problems that takes() accepts; the interface is that of attn_align_loss.h.
//
// What binds them, in clocks of a multiprocessor per pair of logits s, t, at head dims 72 and 64:
//   exponentials   2 at 16 a clock: 0.125, and 0.25 for a backward of two launches
//   tensor cores   144 multiply-adds at 4096 a clock: 0.035 forward; 0.070 for both gradients at once
//   shared memory  products of 64 × 64 read 4 KB per 16 columns, at 128 bytes a clock: 0.070 forward; 0.137 for both
//                  gradients at once, where G is written and read, too
// So exponentials bind, and tiles of 64 × 64 do: they leave registers for several consumers a scheduler, one of which
// computes powers while others wait for products. For 65,536 tokens × 12 heads of 256 tokens 0.125 clocks are 109 µs on
// 132 multiprocessors at 1.755 GHz; with loads and ends of pieces not quite hidden, some 140 µs forward and 200 µs
// backward are to be expected. Reckoned, not measured: these kernels have run in emulation only.
#pragma once

#include "../../attn_align_loss.h"

namespace haste::cuda::hopper {

// 16-bit operands that the copy engine can read where they lie. All others are for the portable kernels.
bool takes(const AttnAlignProblem& problem);

const char* attn_align_loss_forward(const AttnAlignProblem& problem, const AttnAlignRows& rows, void* stream);
const char* attn_align_loss_backward(const AttnAlignProblem& problem, const AttnAlignBackward& backward, void* stream);

}  // namespace haste::cuda::hopper
