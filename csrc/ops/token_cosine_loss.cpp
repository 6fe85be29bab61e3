// token_cosine_loss: schema, checks, launch, registration. What it computes: kernels/token_cosine_loss.h.
#include "kernels/token_cosine_loss.h"

#include <torch/csrc/stable/library.h>

#include <array>
#include <vector>

#include "ops/common.h"

namespace haste {
namespace {

// The product of sizes [from, to), and the one stride that walks all of them, if there is one.
struct Run {
  int64_t count = 1;
  int64_t stride = 0;
  bool regular = true;
};

Run collapse(const Tensor& t, int64_t from, int64_t to) {
  Run run;
  for (int64_t i = to - 1; i >= from; --i) {
    if (t.size(i) == 1) continue;
    if (run.count == 1) {
      run.stride = t.stride(i);
    } else if (t.stride(i) != run.stride * run.count) {
      run.regular = false;
    }
    run.count *= t.size(i);
  }
  return run;
}

bool splits_at(const Tensor& t, int64_t split, int64_t rows_dim) {
  return collapse(t, 0, split).regular && collapse(t, split, rows_dim).regular;
}

// All leading dimensions become (outer, inner): patch tokens behind a class token are read where they lie. A tensor
// that no split serves together with the others is copied.
int64_t choose_split(std::vector<Tensor*> tensors, int64_t rows_dim) {
  int64_t best_split = 0, most = -1;
  for (int64_t split = 0; split <= rows_dim; ++split) {
    int64_t served = 0;
    for (const Tensor* t : tensors) served += splits_at(*t, split, rows_dim);
    if (served > most) most = served, best_split = split;
  }
  for (Tensor* t : tensors) {
    if (!splits_at(*t, best_split, rows_dim)) *t = torch::stable::contiguous(*t);
  }
  return best_split;
}

std::vector<int64_t> row_shape(const Tensor& student) {
  const auto sizes = student.sizes();
  return {sizes.begin(), sizes.end() - 1};
}

void check_inputs(const Tensor& student, const Tensor& teacher) {
  check_shape(student.dim() >= 1 && student.size(student.dim() - 1) >= 1, "student", student,
              "(..., dim) with dim >= 1");
  bool same = student.dim() == teacher.dim();
  for (int64_t i = 0; same && i < student.dim(); ++i) same = student.size(i) == teacher.size(i);
  check_shape(same, "teacher", teacher, "of the shape of student");
  check_same_device(student, teacher, "teacher");
  scalar_type(student, "student"), scalar_type(teacher, "teacher");  // also of those without elements
}

TokenOperand operand(const Tensor& t, int64_t split, const char* argument) {
  const int64_t rows_dim = t.dim() - 1;
  return {t.const_data_ptr(), scalar_type(t, argument), collapse(t, 0, split).stride,
          collapse(t, split, rows_dim).stride};
}

TokenCosineProblem problem(const Tensor& student, const Tensor& teacher, int64_t split) {
  const int64_t rows_dim = student.dim() - 1;
  return {collapse(student, 0, split).count, collapse(student, split, rows_dim).count, student.size(rows_dim),
          operand(student, split, "student"), operand(teacher, split, "teacher")};
}

Tensor forward(Tensor student, Tensor teacher) {
  check_inputs(student, teacher);
  Tensor loss = torch::stable::new_empty(student, row_shape(student), row_type(student));
  if (loss.numel() == 0) return loss;
  student = with_unit_last_stride(student);
  teacher = with_unit_last_stride(teacher);
  const int64_t split = choose_split({&student, &teacher}, student.dim() - 1);
  const auto p = problem(student, teacher, split);
  if (student.is_cuda()) {
    const CudaLaunch launch(student);
#ifdef HASTE_WITH_CUDA
    check_launch(cuda::token_cosine_loss_forward(p, static_cast<float*>(loss.mutable_data_ptr()), launch.stream()),
                 "token_cosine_loss");
#endif
  } else {
    cpu::token_cosine_loss_forward(p, loss.mutable_data_ptr(), parallel_for());
  }
  return loss;
}

Tensor backward(Tensor grad_loss, Tensor student, Tensor teacher) {
  check_inputs(student, teacher);
  const auto rows = row_shape(student);
  bool same = grad_loss.dim() == static_cast<int64_t>(rows.size());
  for (int64_t i = 0; same && i < grad_loss.dim(); ++i) same = grad_loss.size(i) == rows[i];
  check_shape(same, "grad_loss", grad_loss, "of the shape of student without its last dimension");
  STD_TORCH_CHECK(grad_loss.scalar_type() == row_type(student), "grad_loss must be of the type of the loss");
  check_same_device(student, grad_loss, "grad_loss");

  Tensor gradient = torch::stable::new_empty(student, student.sizes());
  if (gradient.numel() == 0) return gradient;
  student = with_unit_last_stride(student);
  teacher = with_unit_last_stride(teacher);
  const int64_t rows_dim = grad_loss.dim();
  const int64_t split = choose_split({&student, &teacher, &grad_loss}, rows_dim);
  const auto p = problem(student, teacher, split);
  const TokenGradient grad_out{grad_loss.const_data_ptr(), collapse(grad_loss, 0, split).stride,
                               collapse(grad_loss, split, rows_dim).stride};
  if (student.is_cuda()) {
    const CudaLaunch launch(student);
#ifdef HASTE_WITH_CUDA
    check_launch(cuda::token_cosine_loss_backward(p, grad_out, gradient.mutable_data_ptr(), launch.stream()),
                 "token_cosine_loss backward");
#endif
  } else {
    cpu::token_cosine_loss_backward(p, grad_out, gradient.mutable_data_ptr(), parallel_for());
  }
  return gradient;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(haste, m) {
  m.def("token_cosine_loss(Tensor student, Tensor teacher, str reduction=\"mean\") -> Tensor");
  m.def("token_cosine_loss_forward(Tensor student, Tensor teacher) -> Tensor");
  m.def("token_cosine_loss_backward(Tensor grad_loss, Tensor student, Tensor teacher) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(haste, CPU, m) {
  m.impl("token_cosine_loss_forward", TORCH_BOX(&forward));
  m.impl("token_cosine_loss_backward", TORCH_BOX(&backward));
}
STABLE_TORCH_LIBRARY_IMPL(haste, CUDA, m) {
  m.impl("token_cosine_loss_forward", TORCH_BOX(&forward));
  m.impl("token_cosine_loss_backward", TORCH_BOX(&backward));
}

}  // namespace haste
