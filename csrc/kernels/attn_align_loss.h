// attn_align_loss: what the operation tells its kernels. The same structures serve CPU and CUDA.
//
// Per row i of (batch, head), over keys j, with s = q_s·k_sᵀ·scale_s and t = q_t·k_tᵀ·scale_t:
//   loss_i = lse(s_i) − Σ_j softmax(t_i)_j · s_ij
//   G_ij   = e^{s_ij − lse(s_i)} − e^{t_ij − lse(t_i)}
//   dq_i   = g_i · scale_s · Σ_j G_ij k_j        dk_j = scale_s · Σ_i g_i G_ij q_i
// where g_i is grad_out of loss_i. As a Kullback–Leibler divergence the loss is less by the teacher's
// entropy, Σ_j softmax(t_i)_j · (log softmax(t_i)_j − log softmax(s_i)_j), with the same gradient.
#pragma once

#include "kernel_types.h"

namespace haste {

// One (batch, heads, tokens, dim) operand where it lies: strides in elements, the last one is 1.
// `data` points at the first token that takes part (a prefix is already skipped).
struct AttnOperand {
  const void* data;
  ScalarType type;
  int64_t dim;
  int64_t stride_batch, stride_head, stride_token;
};

struct AttnAlignProblem {
  int64_t batch, heads, tokens;  // heads: the aligned ones; tokens: without the prefix
  AttnOperand student_q, student_k, teacher_q, teacher_k;
  double student_scale, teacher_scale;
  bool kl = false;     // the loss is the divergence, else the cross-entropy
  int64_t causal = 0;  // b > 0: query i sees the keys of its own block of b tokens and of earlier ones, on both sides
};

// How many keys a query sees, from the first one on.
constexpr int64_t visible_keys(const AttnAlignProblem& problem, int64_t query) {
  const int64_t end = problem.causal > 0 ? (query / problem.causal + 1) * problem.causal : problem.tokens;
  return end < problem.tokens ? end : problem.tokens;
}

// Row results, contiguous; double where the student is Float64, else float. What backward needs of a row are the
// {maximum, 1 / Σ e^{logit − maximum}} of its logits: two numbers, since a log-sum-exp in one would lose the digits of
// its smaller part where logits are large. The unit of the maximum is the kernels' own: natural on the CPU, logits ·
// log2(e) on CUDA.
struct AttnAlignRows {
  void* loss;             // (batch, heads, tokens)
  void* student_softmax;  // (batch, heads, tokens, 2)
  void* teacher_softmax;
};

// Gradient of the rows, same element type as the rows; any strides, 0 included (an expanded scalar).
struct RowGradient {
  const void* data;
  int64_t stride_batch, stride_head, stride_token;
};

// Where a gradient goes: same dim and type as the student operand, its own strides.
// A null `data` means that this gradient is not wanted and must not be computed.
struct AttnGradient {
  void* data;
  int64_t stride_batch, stride_head, stride_token;
};

struct AttnAlignBackward {
  RowGradient grad_out;
  const void* student_softmax;  // as the forward wrote them
  const void* teacher_softmax;
  AttnGradient student_q, student_k;
};

namespace cpu {
// Every combination of student and teacher type. Float64 students compute in double, all others in float.
void attn_align_loss_forward(const AttnAlignProblem&, const AttnAlignRows&, const ParallelFor&);
void attn_align_loss_backward(const AttnAlignProblem&, const AttnAlignBackward&, const ParallelFor&);
}  // namespace cpu

namespace cuda {
// Float32, Float16, BFloat16; all four operands of one type; dim ≤ attn_align_loss_max_dim.
// `stream` is a cudaStream_t. Returns nullptr, or what went wrong in one sentence (static storage).
constexpr int64_t attn_align_loss_max_dim = 128;
const char* attn_align_loss_forward(const AttnAlignProblem&, const AttnAlignRows&, void* stream);
const char* attn_align_loss_backward(const AttnAlignProblem&, const AttnAlignBackward&, void* stream);
}  // namespace cuda

}  // namespace haste
