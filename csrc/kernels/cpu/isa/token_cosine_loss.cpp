// token_cosine_loss, a row at a time: one sweep for the three sums, in backward a second one that finds the row in
// the first-level cache. Memory sets the speed.
#include "convert.h"
#include "kernels.h"

namespace haste::cpu::HASTE_ISA {
namespace {

constexpr double kSmallestNorm = 1e-12;  // as F.normalize

// The three sums of a row in vectors of A, two chains of additions each.
template <class A>
struct RowSums {
  struct Sums {
    Vector<A> student_square{}, teacher_square{}, dot{};

    HASTE_INLINE void add(Vector<A> s, Vector<A> t) {
      student_square += s * s;
      teacher_square += t * t;
      dot += s * t;
    }
  };
  Sums chain[2];

  // `half` tells the chain; float summed in double takes both.
  HASTE_INLINE void add(Vector<A> s, Vector<A> t, int half) { chain[half].add(s, t); }
  template <class T>
  HASTE_INLINE void add(T s, T t, int) {
    chain[0].add(lower_half(s), lower_half(t));
    chain[1].add(upper_half(s), upper_half(t));
  }

  HASTE_INLINE double student_square() const { return sum<A>(chain[0].student_square + chain[1].student_square); }
  HASTE_INLINE double teacher_square() const { return sum<A>(chain[0].teacher_square + chain[1].teacher_square); }
  HASTE_INLINE double dot() const { return sum<A>(chain[0].dot + chain[1].dot); }
};

struct Totals {
  double student_square, teacher_square, dot;
};

template <class T, class A, class Student, class Teacher>
HASTE_INLINE Totals sum_row(const Student* s, const Teacher* t, int64_t dim) {
  constexpr int L = kLanes<T>;
  RowSums<A> sums;
  int64_t d = 0;
  for (; d + 2 * L <= dim; d += 2 * L) {
    sums.add(load_as<T>(s + d), load_as<T>(t + d), 0);
    sums.add(load_as<T>(s + d + L), load_as<T>(t + d + L), 1);
  }
  for (int half = 0; d < dim; d += L, ++half) {
    const int64_t count = least(dim - d, L);
    sums.add(load_first<T>(s + d, count), load_first<T>(t + d, count), half);
  }
  return {sums.student_square(), sums.teacher_square(), sums.dot()};
}

// In double: there is time for it while memory delivers fp32, squares do not overflow, and a near-zero cosine keeps
// its digits. Half-precision numbers come twice as fast and have few digits to lose: float does for them, unless the
// squares leave its range.
template <class T, class Student, class Teacher>
HASTE_INLINE Totals row_totals(const Student* s, const Teacher* t, int64_t dim) {
  if constexpr (sizeof(Student) == 2 && sizeof(Teacher) == 2) {
    const auto safe = [](double square) { return square > 0x1p-60 && square < 0x1p120; };
    const Totals totals = sum_row<float, float>(s, t, dim);
    if (safe(totals.student_square) && safe(totals.teacher_square)) return totals;
  }
  return sum_row<T, double>(s, t, dim);
}

struct RowNorms {
  double student_inverse, teacher_inverse, cosine;
  bool student_clamped;
};

template <class T, class Student, class Teacher>
RowNorms row_norms(const Student* s, const Teacher* t, int64_t dim) {
  const Totals sums = row_totals<T>(s, t, dim);
  const double student_norm = __builtin_sqrt(sums.student_square), teacher_norm = __builtin_sqrt(sums.teacher_square);
  const bool student_clamped = student_norm < kSmallestNorm;
  const double student_inverse = 1 / (student_clamped ? kSmallestNorm : student_norm);
  const double teacher_inverse = 1 / (teacher_norm < kSmallestNorm ? kSmallestNorm : teacher_norm);
  return {student_inverse, teacher_inverse, sums.dot * student_inverse * teacher_inverse, student_clamped};
}

// factor · (cosine · s / ‖s‖ − t / ‖t‖), of the student's type, from element `first` of the gradient on.
template <class T, class Student, class Teacher>
void write_gradient(const Student* s, const Teacher* t, const RowNorms& norms, double g, int64_t dim, int64_t first,
                    void* gradient) {
  constexpr int L = kLanes<T>;
  const T student_inverse = T(norms.student_inverse), teacher_inverse = T(norms.teacher_inverse);
  const T cosine = T(norms.student_clamped ? 0 : norms.cosine), factor = T(g * norms.student_inverse);
  const auto combine = [&](Vector<T> s_lanes, Vector<T> t_lanes) {
    return factor * (cosine * (s_lanes * student_inverse) - t_lanes * teacher_inverse);
  };
  Student* out = static_cast<Student*>(gradient) + first;
  int64_t d = 0;
  for (; d + L <= dim; d += L) narrow(out + d, combine(load_as<T>(s + d), load_as<T>(t + d)));
  if (d < dim) {
    store_first<T>(out + d, combine(load_first<T>(s + d, dim - d), load_first<T>(t + d, dim - d)), dim - d);
  }
}

// Calls use(student row, teacher row, outer, inner, row) for the rows [begin, end).
template <class Use>
HASTE_INLINE void for_rows(const TokenCosineProblem& problem, int64_t begin, int64_t end, const Use& use) {
  const TokenOperand &student = problem.student, &teacher = problem.teacher;
  with_elements(student.data, student.type, [&](auto* s) {
    with_elements(teacher.data, teacher.type, [&](auto* t) {
      for (int64_t row = begin; row < end; ++row) {
        const int64_t outer = row / problem.inner, inner = row % problem.inner;
        use(s + outer * student.stride_outer + inner * student.stride_inner,
            t + outer * teacher.stride_outer + inner * teacher.stride_inner, outer, inner, row);
      }
    });
  });
}

template <class T>
void forward(const TokenCosineProblem& problem, void* loss, int64_t begin, int64_t end) {
  for_rows(problem, begin, end, [&](auto* s, auto* t, int64_t, int64_t, int64_t row) {
    static_cast<T*>(loss)[row] = T(-row_norms<T>(s, t, problem.dim).cosine);
  });
}

template <class T>
void backward(const TokenCosineProblem& problem, const TokenGradient& grad_out, void* student_gradient, int64_t begin,
              int64_t end) {
  for_rows(problem, begin, end, [&](auto* s, auto* t, int64_t outer, int64_t inner, int64_t row) {
    const RowNorms norms = row_norms<T>(s, t, problem.dim);
    const T* gradients = static_cast<const T*>(grad_out.data);
    const double g = gradients[outer * grad_out.stride_outer + inner * grad_out.stride_inner];
    write_gradient<T>(s, t, norms, g, problem.dim, row * problem.dim, student_gradient);
  });
}

}  // namespace

template <class T>
TokenCosineKernels token_cosine_loss() {
  return {forward<T>, backward<T>};
}
template TokenCosineKernels token_cosine_loss<HASTE_COMPUTE>();

}  // namespace haste::cpu::HASTE_ISA
