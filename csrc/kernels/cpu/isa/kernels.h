// The kernels of one processor path: the same functions in a namespace per instruction set, and the table through
// which they are called. They work on a piece of the problem; the pieces are dealt out by the sources one folder up,
// which are compiled for any processor.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/attn_align_loss.h"
#include "kernels/taylor_extrapolate.h"
#include "kernels/token_cosine_loss.h"

namespace haste::cpu {

// Queries against keys of one (batch, head).
struct AttnBlock {
  int64_t batch, head;
  int64_t query_begin, query_end;
  int64_t key_begin, key_end;
};

struct Kernels {
  // Bytes of scratch (aligned to 64) that a block with up to `keys` keys takes.
  size_t (*attn_align_loss_scratch)(const AttnAlignProblem&, int64_t keys);
  void (*attn_align_loss_forward)(const AttnAlignProblem&, const AttnAlignRows&, const AttnBlock&, void* scratch);
  // A block computes dq of its queries over its keys, and dk of its keys over its queries: whole where the block
  // holds all keys, or all queries.
  void (*attn_align_loss_backward)(const AttnAlignProblem&, const AttnAlignBackward&, const AttnBlock&, void* scratch);

  // Rows [begin, end) of outer × inner.
  void (*token_cosine_loss_forward)(const TokenCosineProblem&, void* loss, int64_t begin, int64_t end);
  void (*token_cosine_loss_backward)(const TokenCosineProblem&, const TokenGradient&, void* student_gradient,
                                     int64_t begin, int64_t end);

  // Bytes of scratch (aligned to 64), and rows [begin, end) of batch × tokens.
  size_t (*taylor_extrapolate_scratch)(const TaylorProblem&);
  void (*taylor_extrapolate)(const TaylorProblem&, int64_t begin, int64_t end, void* scratch);
};

#define HASTE_DECLARE_KERNELS(isa)                                                                               \
  namespace isa {                                                                                                \
  size_t attn_align_loss_scratch(const AttnAlignProblem&, int64_t keys);                                         \
  void attn_align_loss_forward(const AttnAlignProblem&, const AttnAlignRows&, const AttnBlock&, void* scratch);  \
  void attn_align_loss_backward(const AttnAlignProblem&, const AttnAlignBackward&, const AttnBlock&,             \
                                void* scratch);                                                                  \
  void token_cosine_loss_forward(const TokenCosineProblem&, void* loss, int64_t begin, int64_t end);             \
  void token_cosine_loss_backward(const TokenCosineProblem&, const TokenGradient&, void* student_gradient,       \
                                  int64_t begin, int64_t end);                                                   \
  size_t taylor_extrapolate_scratch(const TaylorProblem&);                                                       \
  void taylor_extrapolate(const TaylorProblem&, int64_t begin, int64_t end, void* scratch);                      \
  }

HASTE_DECLARE_KERNELS(portable)
HASTE_DECLARE_KERNELS(avx2)
HASTE_DECLARE_KERNELS(avx512)
HASTE_DECLARE_KERNELS(avx512bf16)
HASTE_DECLARE_KERNELS(amx)

// The kernels of the path in force.
const Kernels& active_kernels();

}  // namespace haste::cpu
