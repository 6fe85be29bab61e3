// attn_align_loss: schema, checks, launch, registration. What it computes: kernels/attn_align_loss.h.
//
// The public operation is composed in Python (haste_ext/ops/attn_align_loss.py) of the rows below and torch's own
// reduction, so that `mean`, `sum` and `none` share one kernel and its gradient.
#include "kernels/attn_align_loss.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <tuple>

#include "ops/common.h"

namespace haste {
namespace {

struct Inputs {
  Tensor student_q, student_k, teacher_q, teacher_k;  // last stride 1; they keep copies alive
  AttnAlignProblem problem;
};

AttnOperand operand(const Tensor& t, int64_t prefix, const char* argument) {
  const auto type = scalar_type(t, argument);
  const auto* first = static_cast<const char*>(t.const_data_ptr()) + prefix * t.stride(2) * t.element_size();
  return {first, type, t.size(3), t.stride(0), t.stride(1), t.stride(2)};
}

void check_pair(const Tensor& q, const Tensor& k, int64_t prefix, const char* q_name, const char* k_name) {
  check_shape(q.dim() == 4 && q.size(3) >= 1, q_name, q, "(batch, heads, tokens, dim) with dim >= 1");
  bool same = k.dim() == 4;
  for (int64_t i = 0; same && i < 4; ++i) same = k.size(i) == q.size(i);
  check_shape(same, k_name, k, std::string("of the shape of ") + q_name);
  STD_TORCH_CHECK(k.scalar_type() == q.scalar_type(), k_name, " must have the type of ", q_name);
  STD_TORCH_CHECK(prefix >= 0 && prefix <= q.size(2), "the prefix of ", q_name, " must lie between 0 and its ",
                  q.size(2), " tokens, got ", prefix);
}

Inputs inputs(const Tensor& student_q, const Tensor& student_k, const Tensor& teacher_q, const Tensor& teacher_k,
              std::optional<double> student_scale, std::optional<double> teacher_scale, int64_t student_prefix,
              int64_t teacher_prefix, bool kl, int64_t causal) {
  check_pair(student_q, student_k, student_prefix, "student_q", "student_k");
  check_pair(teacher_q, teacher_k, teacher_prefix, "teacher_q", "teacher_k");
  check_shape(teacher_q.size(0) == student_q.size(0), "teacher_q", teacher_q, "of the batch size of student_q");
  const int64_t tokens = student_q.size(2) - student_prefix;
  STD_TORCH_CHECK(teacher_q.size(2) - teacher_prefix == tokens,
                  "teacher_q must have as many tokens after its prefix as student_q, ", tokens, ", got ",
                  teacher_q.size(2) - teacher_prefix);
  STD_TORCH_CHECK(causal >= 0, "causal must be the size of a block of tokens, or 0, got ", causal);
  check_same_device(student_q, student_k, "student_k");
  check_same_device(student_q, teacher_q, "teacher_q");
  check_same_device(student_q, teacher_k, "teacher_k");

  Inputs in{with_unit_last_stride(student_q),
            with_unit_last_stride(student_k),
            with_unit_last_stride(teacher_q),
            with_unit_last_stride(teacher_k),
            {}};
  in.problem = {student_q.size(0),
                std::min(student_q.size(1), teacher_q.size(1)),
                tokens,
                operand(in.student_q, student_prefix, "student_q"),
                operand(in.student_k, student_prefix, "student_k"),
                operand(in.teacher_q, teacher_prefix, "teacher_q"),
                operand(in.teacher_k, teacher_prefix, "teacher_k"),
                student_scale.value_or(1.0 / std::sqrt(static_cast<double>(student_q.size(3)))),
                teacher_scale.value_or(1.0 / std::sqrt(static_cast<double>(teacher_q.size(3)))),
                kl,
                causal};
  if (student_q.is_cuda()) {
    STD_TORCH_CHECK(teacher_q.scalar_type() == student_q.scalar_type(),
                    "teacher_q must have the type of student_q on CUDA; haste_ext.attn_align_loss converts both");
    for (const auto* t : {&student_q, &teacher_q}) {
      STD_TORCH_CHECK(t->size(3) <= cuda::attn_align_loss_max_dim, t == &student_q ? "student_q" : "teacher_q",
                      " must have a head dim of at most ", cuda::attn_align_loss_max_dim, " on CUDA, got ", t->size(3));
    }
  }
  return in;
}

std::tuple<Tensor, Tensor, Tensor> forward(Tensor student_q, Tensor student_k, Tensor teacher_q, Tensor teacher_k,
                                           std::optional<double> student_scale, std::optional<double> teacher_scale,
                                           int64_t student_prefix, int64_t teacher_prefix, bool kl, int64_t causal) {
  const auto in = inputs(student_q, student_k, teacher_q, teacher_k, student_scale, teacher_scale, student_prefix,
                         teacher_prefix, kl, causal);
  const auto& p = in.problem;
  const auto empty_softmax = [&] {
    return torch::stable::new_empty(student_q, {p.batch, p.heads, p.tokens, 2}, row_type(student_q));
  };
  Tensor loss = torch::stable::new_empty(student_q, {p.batch, p.heads, p.tokens}, row_type(student_q));
  Tensor student_softmax = empty_softmax(), teacher_softmax = empty_softmax();
  const AttnAlignRows rows{loss.mutable_data_ptr(), student_softmax.mutable_data_ptr(),
                           teacher_softmax.mutable_data_ptr()};
  if (loss.numel() > 0 && student_q.is_cuda()) {
    const CudaLaunch launch(student_q);
#ifdef HASTE_WITH_CUDA
    check_launch(cuda::attn_align_loss_forward(p, rows, launch.stream()), "attn_align_loss");
#endif
  } else if (loss.numel() > 0) {
    cpu::attn_align_loss_forward(p, rows, parallel_for());
  }
  return {loss, student_softmax, teacher_softmax};
}

// A gradient of the student's shape, in memory of its own: no two elements share a place, though the student's may, and
// its last stride is 1. Its other dimensions come in the order of the student's strides, the longest first.
// _empty_gradient in haste_ext/ops/attn_align_loss.py is the same. The heads and tokens that take no part get zeros.
Tensor empty_gradient(const Tensor& student, const AttnAlignProblem& p) {
  std::array<int64_t, 3> order{0, 1, 2};
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return student.stride(a) > student.stride(b); });
  Tensor gradient = torch::stable::new_empty(
      student, {student.size(order[0]), student.size(order[1]), student.size(order[2]), student.size(3)});
  for (int64_t i = 0; i < 3; ++i) {
    const int64_t at = std::find(order.begin(), order.end(), i) - order.begin();
    if (at == i) continue;
    gradient = torch::stable::transpose(gradient, i, at);
    std::swap(order[i], order[at]);
  }
  if (p.heads != student.size(1) || p.tokens != student.size(2)) torch::stable::zero_(gradient);
  return gradient;
}

AttnGradient destination(const Tensor& gradient, int64_t prefix) {
  auto* first = static_cast<char*>(gradient.mutable_data_ptr()) + prefix * gradient.stride(2) * gradient.element_size();
  return {first, gradient.stride(0), gradient.stride(1), gradient.stride(2)};
}

std::tuple<Tensor, Tensor> backward(Tensor grad_loss, Tensor student_q, Tensor student_k, Tensor teacher_q,
                                    Tensor teacher_k, Tensor student_softmax, Tensor teacher_softmax,
                                    std::optional<double> student_scale, std::optional<double> teacher_scale,
                                    int64_t student_prefix, int64_t teacher_prefix, bool need_q, bool need_k,
                                    int64_t causal) {
  const auto in = inputs(student_q, student_k, teacher_q, teacher_k, student_scale, teacher_scale, student_prefix,
                         teacher_prefix, /*kl=*/false, causal);  // the teacher's entropy has no gradient
  const auto& p = in.problem;
  const auto check_rows = [&](const Tensor& t, int64_t numbers, const char* argument, const char* shape) {
    check_shape(t.dim() == (numbers == 1 ? 3 : 4) && t.size(0) == p.batch && t.size(1) == p.heads &&
                    t.size(2) == p.tokens && t.size(t.dim() - 1) == (numbers == 1 ? p.tokens : numbers),
                argument, t, shape);
    STD_TORCH_CHECK(t.scalar_type() == row_type(student_q), argument, " must be of the type of the loss");
    check_same_device(student_q, t, argument);
  };
  check_rows(grad_loss, 1, "grad_loss", "(batch, aligned heads, tokens after the prefix)");
  check_rows(student_softmax, 2, "student_softmax", "(batch, aligned heads, tokens after the prefix, 2)");
  check_rows(teacher_softmax, 2, "teacher_softmax", "(batch, aligned heads, tokens after the prefix, 2)");
  student_softmax = torch::stable::contiguous(student_softmax);
  teacher_softmax = torch::stable::contiguous(teacher_softmax);

  const auto not_wanted = [&] { return torch::stable::new_empty(student_q, {0}); };
  Tensor grad_q = need_q ? empty_gradient(in.student_q, p) : not_wanted();
  Tensor grad_k = need_k ? empty_gradient(in.student_k, p) : not_wanted();
  const AttnAlignBackward b{{grad_loss.const_data_ptr(), grad_loss.stride(0), grad_loss.stride(1), grad_loss.stride(2)},
                            student_softmax.const_data_ptr(),
                            teacher_softmax.const_data_ptr(),
                            need_q ? destination(grad_q, student_prefix) : AttnGradient{},
                            need_k ? destination(grad_k, student_prefix) : AttnGradient{}};
  if (grad_loss.numel() == 0 || !(need_q || need_k)) return {grad_q, grad_k};
  if (student_q.is_cuda()) {
    const CudaLaunch launch(student_q);
#ifdef HASTE_WITH_CUDA
    check_launch(cuda::attn_align_loss_backward(p, b, launch.stream()), "attn_align_loss backward");
#endif
  } else {
    cpu::attn_align_loss_backward(p, b, parallel_for());
  }
  return {grad_q, grad_k};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(haste, m) {
  m.def(
      "attn_align_loss(Tensor student_q, Tensor student_k, Tensor teacher_q, Tensor teacher_k, "
      "float? student_scale=None, float? teacher_scale=None, int student_prefix=0, int teacher_prefix=0, "
      "str reduction=\"mean\", str divergence=\"cross_entropy\", int causal=0) -> Tensor");
  m.def(
      "attn_align_loss_forward(Tensor student_q, Tensor student_k, Tensor teacher_q, Tensor teacher_k, "
      "float? student_scale, float? teacher_scale, int student_prefix, int teacher_prefix, "
      "bool kl=False, int causal=0) "
      "-> (Tensor loss, Tensor student_softmax, Tensor teacher_softmax)");
  m.def(
      "attn_align_loss_backward(Tensor grad_loss, Tensor student_q, Tensor student_k, Tensor teacher_q, "
      "Tensor teacher_k, Tensor student_softmax, Tensor teacher_softmax, float? student_scale, float? teacher_scale, "
      "int student_prefix, int teacher_prefix, bool need_q, bool need_k, int causal=0) "
      "-> (Tensor grad_q, Tensor grad_k)");
}

// One function for both keys: it branches on the device, and in a build without CUDA says what is missing.
STABLE_TORCH_LIBRARY_IMPL(haste, CPU, m) {
  m.impl("attn_align_loss_forward", TORCH_BOX(&forward));
  m.impl("attn_align_loss_backward", TORCH_BOX(&backward));
}
STABLE_TORCH_LIBRARY_IMPL(haste, CUDA, m) {
  m.impl("attn_align_loss_forward", TORCH_BOX(&forward));
  m.impl("attn_align_loss_backward", TORCH_BOX(&backward));
}

}  // namespace haste
