// The kernels of one instruction set: for every operation a table of functions that compute in T, float or double, in a
// namespace per instruction set. They work on a part of the problem; the sources one folder up, which are compiled for
// any processor, share it out.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/attn_align_loss.h"
#include "kernels/taylor_extrapolate.h"
#include "kernels/token_cosine_loss.h"
#include "operations.h"

namespace haste::cpu {

// Queries against keys of one (batch, head).
struct AttnBlock {
  int64_t batch, head;
  int64_t query_begin, query_end;
  int64_t key_begin, key_end;
};

struct AttnAlignKernels {
  // Bytes of scratch (aligned to 64) that a block with up to `keys` keys takes.
  size_t (*scratch)(const AttnAlignProblem&, int64_t keys);
  void (*forward)(const AttnAlignProblem&, const AttnAlignRows&, const AttnBlock&, void* scratch);
  // A block computes dq of its queries over its keys, and dk of its keys over its queries: whole where the block
  // holds all keys, or all queries.
  void (*backward)(const AttnAlignProblem&, const AttnAlignBackward&, const AttnBlock&, void* scratch);
};

// Rows [begin, end) of outer × inner.
struct TokenCosineKernels {
  void (*forward)(const TokenCosineProblem&, void* loss, int64_t begin, int64_t end);
  void (*backward)(const TokenCosineProblem&, const TokenGradient&, void* student_gradient, int64_t begin, int64_t end);
};

// Bytes of scratch (aligned to 64), and rows [begin, end) of batch × tokens.
struct TaylorKernels {
  size_t (*scratch)(const TaylorProblem&);
  void (*extrapolate)(const TaylorProblem&, int64_t begin, int64_t end, void* scratch);
};

// Of one instruction set and type.
struct Kernels {
#define HASTE_TABLE(operation, Table) Table operation;
  HASTE_OPERATIONS(HASTE_TABLE)
#undef HASTE_TABLE
};

#define HASTE_DECLARE(operation, Table) \
  template <class T>                    \
  Table operation();
#define HASTE_ENTRY(operation, Table) operation<T>(),
#define HASTE_DECLARE_ISA(isa)              \
  namespace isa {                           \
  HASTE_OPERATIONS(HASTE_DECLARE)           \
  template <class T>                        \
  Kernels kernels() {                       \
    return {HASTE_OPERATIONS(HASTE_ENTRY)}; \
  }                                         \
  }
HASTE_DECLARE_ISA(portable)
HASTE_DECLARE_ISA(avx2)
HASTE_DECLARE_ISA(avx512)

// These two are AVX-512 with products of bf16, which serve the attention maps that are computed in float.
namespace avx512bf16 {
template <class T>
AttnAlignKernels attn_align_loss();
}
namespace amx {
template <class T>
AttnAlignKernels attn_align_loss();
}

// The kernels of the instruction set in force that compute in double, or in float.
const Kernels& active_kernels(bool in_double);

}  // namespace haste::cpu
