// The Hopper kernels of attn_align_loss, for problems that supports() accepts; the interface is that of attn_align_loss.h.
//
// What they cost, in clocks of a multiprocessor per 64 × 64 block of pairs of logits s, t, at head dims 72 and 64 in
// bf16, counted in their machine code by tools/kernel_counts (it says how) and kept in tests/kernels/cuda:
//                              issue per scheduler   exponentials   tensor   shared memory
//   forward                                    412            544      288             336
//   dq                                         262            512      432             424
//   dk                                         277            512      432             488
//   dq and dk at once (N ≤ 256)                484            514      576             712
// Powers, 16 a clock: 512 for the two of a pair. Tensor cores: 2,048 multiply-adds a clock, 144 per pair forward, 288
// for both gradients at once. Shared memory, 128 bytes a clock: products of 64 × 64 read 4 KB per 16 columns (half of
// it where A is in registers), lanes of dk a number per query and model (128), both gradients at once write and read G
// (128), and tiles come in. So exponentials bind one gradient or the forward alone, shared memory both gradients at
// once. Tiles of 64 × 64 leave registers for several consumers a scheduler, one of which computes powers while others
// wait for products. For 65,536 tokens × 12 heads of 256 tokens, on 132 multiprocessors at 1.755 GHz, the largest
// column is 115 µs forward and 151 µs backward, without loads and ends of work tiles that are not quite hidden. Counted,
// not measured: they have run in emulation only.
#pragma once

#include "../../attn_align_loss.h"

namespace haste::cuda::hopper {

// 16-bit operands that the copy engine can read where they lie, no causal mask. All others are for the portable
// kernels.
bool supports(const AttnAlignProblem& problem);

const char* attn_align_loss_forward(const AttnAlignProblem& problem, const AttnAlignRows& rows, void* stream);
const char* attn_align_loss_backward(const AttnAlignProblem& problem, const AttnAlignBackward& backward, void* stream);

}  // namespace haste::cuda::hopper
