// attn_align_loss between the matrix products: operands into scratch, the online softmax, gradients out of scratch.
// A tile of logits is [key][query], Queries wide, with the queries along the lanes.
#pragma once

#include "convert.h"
#include "exp_log.h"
#include "kernels.h"

namespace haste::cpu::HASTE_ISA {
namespace {

// Long sums are built from shorter ones: their rounding errors grow with the length of a chain of additions.
constexpr int64_t kSummedAtOnce = 16;

// Also the maximum to start from, negative: −∞ would give 0 · ∞ on the first rescaling.
template <class T>
constexpr T kLargestLogit = sizeof(T) == sizeof(float) ? T(1e38) : T(1e300);

// Of a key that a query does not see: below every logit, and finite, as is its distance from any maximum.
template <class T>
constexpr T kHiddenLogit = -2 * kLargestLogit<T>;

// scale · sum, held to ± kLargestLogit, lest ∞ − ∞ make NaN of what was finite. A sum that is not, as of finite operands
// none is (see rescale_to_avoid_overflow()), becomes NaN, and with it the row: a loss must not hide that an operand was
// infinite.
template <class T>
HASTE_INLINE Vector<T> to_logit(Vector<T> sum, T scale) {
  return max<T>(broadcast(-kLargestLogit<T>), min<T>(broadcast(kLargestLogit<T>), sum * scale)) + sum * T(0);
}

// A row is a whole number of vectors and then the last vector once more, overlapping: no tail to take apart. Rows
// shorter than a vector go element by element.
template <class T, class Element>
HASTE_INLINE void pack_row(const Element* from, int64_t dim, T* to, int64_t stride) {
  constexpr int L = kLanes<T>;
  if (dim >= L) {
    store(to + stride - L, Vector<T>{});
    for (int64_t d = 0; d + L <= dim; d += L) store(to + d, load_as<T>(from + d));
    store(to + dim - L, load_as<T>(from + dim - L));
  } else {
    T row[L];
    store(row, load_first<T>(from, dim));
    for (int64_t d = 0; d < stride; ++d) to[d] = d < dim ? row[d] : 0;
  }
}

// Divides the numbers by a power of two, which it returns, such that no product of two operands, nor a sum of such
// products, can overflow float: 1 unless there is a finite one above 2^56. Infinity stays what it is.
template <class T>
double rescale_to_avoid_overflow(T* numbers, int64_t count) {
  constexpr T limit = T(0x1p56);
  if (sizeof(T) == sizeof(double)) return 1;
  Vector<T> largest{};
  for (int64_t i = 0; i < count; i += kLanes<T>) {
    const Vector<T> v = load(numbers + i);
    largest = max<T>(max<T>(v, -v), largest);
  }
  T top = 0;
  for (int i = 0; i < kLanes<T>; ++i) top = largest[i] > top ? largest[i] : top;
  if (top <= limit) return 1;
  if (top - top != 0) {  // of the finite ones: their rows are not to suffer
    top = 0;
    for (int64_t i = 0; i < count; ++i) {
      const T size = numbers[i] < 0 ? -numbers[i] : numbers[i];
      if (size - size == 0 && size > top) top = size;
    }
  }
  double divisor = 1;
  while (top / divisor > limit) divisor *= 2;
  for (int64_t i = 0; i < count; i += kLanes<T>) store(numbers + i, load(numbers + i) * T(1 / divisor));
  return divisor;
}

// The rows of a strided operand lie on pages of their own, where the processor does not read ahead by itself.
template <class Element>
HASTE_INLINE void prefetch(const Element* row, int64_t dim) {
  for (int64_t d = 0; d < dim; d += 64 / int64_t(sizeof(Element))) __builtin_prefetch(row + d, 0, 2);
}

// `count` tokens from `first` on as rows of `stride` numbers of type T; zeros beyond dim, and in the rows from count
// to `padded`.
template <class T>
void pack_tokens(const AttnOperand& x, const AttnBlock& block, int64_t first, int64_t count, int64_t padded, T* to,
                 int64_t stride) {
  constexpr int64_t kAhead = 16;
  with_elements(x.data, x.type, [&](auto* data) {
    data += block.batch * x.stride_batch + block.head * x.stride_head + first * x.stride_token;
    for (int64_t i = 0; i < count; ++i) {
      if (i + kAhead < count) prefetch(data + (i + kAhead) * x.stride_token, x.dim);
      pack_row(data + i * x.stride_token, x.dim, to + i * stride, stride);
    }
  });
  for (int64_t i = count * stride; i < padded * stride; ++i) to[i] = 0;
}

// `count` rows of sums, times scale, to where the gradient of the tokens from `first` on goes.
template <class T>
void unpack_tokens(const T* from, int64_t stride, T scale, int64_t dim, const AttnGradient& x, ScalarType type,
                   const AttnBlock& block, int64_t first, int64_t count) {
  constexpr int L = kLanes<T>;
  with_elements(x.data, type, [&](auto* data) {
    data += block.batch * x.stride_batch + block.head * x.stride_head + first * x.stride_token;
    for (int64_t i = 0; i < count; ++i) {
      auto* to = data + i * x.stride_token;
      const T* row = from + i * stride;
      if (dim >= L) {
        for (int64_t d = 0; d + L <= dim; d += L) narrow(to + d, load(row + d) * scale);
        narrow(to + dim - L, load(row + dim - L) * scale);
      } else {
        store_first<T>(to, load(row) * scale, dim);
      }
    }
  });
}

// How many of the block's keys, from its first on, the queries before `query_end` see between them.
HASTE_INLINE int64_t keys_in_sight(const AttnAlignProblem& problem, const AttnBlock& block, int64_t query_end) {
  const int64_t end = least(visible_keys(problem, query_end - 1), block.key_end);
  return end > block.key_begin ? end - block.key_begin : 0;
}

// Under a causal mask: the logits [key][query] of `count` keys from `first_key` on become `hidden` where a query, of
// Queries from `first_query` on, does not see the key. Its first seer is the first query of the key's own block.
template <int Queries, class T>
void hide_keys(const AttnAlignProblem& problem, int64_t first_query, int64_t first_key, int64_t count, T hidden,
               T* logits) {
  if (first_key + count <= visible_keys(problem, first_query)) return;
  for (int64_t key = 0; key < count; ++key) {
    const int64_t first_seer = (first_key + key) / problem.causal * problem.causal;
    for (int64_t i = 0; i < least(first_seer - first_query, Queries); ++i) logits[key * Queries + i] = hidden;
  }
}

// First row of a (batch, heads, tokens) result.
HASTE_INLINE int64_t first_row(const AttnAlignProblem& problem, const AttnBlock& block) {
  return (block.batch * problem.heads + block.head) * problem.tokens;
}

// Per query, over the keys seen so far: the maxima, Σ e^{s−max_s}, Σ e^{t−max_t} and x = Σ e^{t−max_t} (s − max_s), for
// the divergence (kKl) x = Σ e^{t−max_t} ((s − max_s) − (t − max_t)). Measuring a logit from its maximum keeps the digits
// that lse(s) − Σ softmax(t) s would cancel. A logit is what a tile holds times a positive factor; its unit is `exp`'s.
template <class T, int Queries>
struct OnlineSoftmax {
  alignas(64) T student_max[Queries], student_sum[Queries];
  alignas(64) T teacher_max[Queries], teacher_sum[Queries];
  alignas(64) T cross[Queries];

  void reset() {
    for (int i = 0; i < Queries; ++i) {
      student_max[i] = teacher_max[i] = -kLargestLogit<T>;
      student_sum[i] = teacher_sum[i] = cross[i] = 0;
    }
  }

  // One tile of logits, `keys` rows.
  template <bool kKl, class Exp>
  HASTE_INLINE void update(const T* s, T student_factor, const T* t, T teacher_factor, int64_t keys, const Exp& exp) {
    for (int i = 0; i < Queries; i += kLanes<T>) {
      update_lanes<kKl>(s + i, student_factor, t + i, teacher_factor, keys, exp, i);
    }
  }

  // Rows [0, count) to where the caller keeps them, in natural units: one of the logits' is `unit` of them.
  template <bool kKl>
  void finish(const AttnAlignRows& rows, int64_t first_row, T unit, int64_t count) const {
    T* loss = static_cast<T*>(rows.loss) + first_row;
    T* student = static_cast<T*>(rows.student_softmax) + 2 * first_row;
    T* teacher = static_cast<T*>(rows.teacher_softmax) + 2 * first_row;
    for (int64_t i = 0; i < count; i += kLanes<T>) {
      const Vector<T> sum_t = load(teacher_sum + i);
      const Vector<T> sums = kKl ? load(student_sum + i) / sum_t : load(student_sum + i);
      store_first<T>(loss + i, log<T>(sums) - load(cross + i) * unit / sum_t, least(count - i, kLanes<T>));
    }
    for (int64_t i = 0; i < count; ++i) {
      student[2 * i] = student_max[i] * unit;
      student[2 * i + 1] = 1 / student_sum[i];
      teacher[2 * i] = teacher_max[i] * unit;
      teacher[2 * i + 1] = 1 / teacher_sum[i];
    }
  }

 private:
  template <bool kKl, class Exp>
  HASTE_INLINE void update_lanes(const T* s, T student_factor, const T* t, T teacher_factor, int64_t keys,
                                 const Exp& exp, int i) {
    Vector<T> top_s = load(s), top_t = load(t);
    for (int64_t key = 1; key < keys; ++key) {
      top_s = max<T>(load(s + key * Queries), top_s);
      top_t = max<T>(load(t + key * Queries), top_t);
    }
    const Vector<T> old_s = load(student_max + i), old_t = load(teacher_max + i);
    const Vector<T> max_s = max<T>(top_s * student_factor, old_s), max_t = max<T>(top_t * teacher_factor, old_t);
    Vector<T> sum_s{}, sum_t{}, x{};
    for (int64_t first = 0; first < keys; first += kSummedAtOnce) {
      Vector<T> part_s{}, part_t{}, part_x{};
      for (int64_t key = first; key < least(first + kSummedAtOnce, keys); ++key) {
        const Vector<T> from_max = load(s + key * Queries) * student_factor - max_s;
        const Vector<T> teacher_from_max = load(t + key * Queries) * teacher_factor - max_t;
        const Vector<T> weight = exp(teacher_from_max);
        part_s += exp(from_max);
        part_t += weight;
        part_x += weight * (kKl ? from_max - teacher_from_max : from_max);
      }
      sum_s += part_s;
      sum_t += part_t;
      x += part_x;
    }
    const Vector<T> shrink_s = exp(old_s - max_s), shrink_t = exp(old_t - max_t);
    const Vector<T> old_sum_t = load(teacher_sum + i);
    const Vector<T> moved = kKl ? (old_s - max_s) - (old_t - max_t) : old_s - max_s;
    store(cross + i, (load(cross + i) + old_sum_t * moved) * shrink_t + x);
    store(student_sum + i, load(student_sum + i) * shrink_s + sum_s);
    store(teacher_sum + i, old_sum_t * shrink_t + sum_t);
    store(student_max + i, max_s);
    store(teacher_max + i, max_t);
  }
};

// What backward knows of a block of queries: the maxima, and grad_out / Σ e^{logit − maximum}; 0 in the lanes past the
// last query.
template <class T, int Queries>
struct RowState {
  alignas(64) T student_max[Queries], teacher_max[Queries], student_factor[Queries], teacher_factor[Queries];

  void load_rows(const AttnAlignProblem& problem, const AttnAlignBackward& backward, const AttnBlock& block,
                 int64_t first, int64_t count) {
    const int64_t row = first_row(problem, block) + first;
    const RowGradient& g = backward.grad_out;
    const T* gradient = static_cast<const T*>(g.data) + block.batch * g.stride_batch + block.head * g.stride_head +
                        first * g.stride_token;
    const T* student = static_cast<const T*>(backward.student_softmax) + 2 * row;
    const T* teacher = static_cast<const T*>(backward.teacher_softmax) + 2 * row;
    for (int64_t i = 0; i < Queries; ++i) {
      const bool inside = i < count;
      const T grad_out = inside ? gradient[i * g.stride_token] : 0;
      student_max[i] = inside ? student[2 * i] : 0;
      teacher_max[i] = inside ? teacher[2 * i] : 0;
      student_factor[i] = inside ? grad_out * student[2 * i + 1] : 0;
      teacher_factor[i] = inside ? grad_out * teacher[2 * i + 1] : 0;
    }
  }
};

}  // namespace
}  // namespace haste::cpu::HASTE_ISA
