// attn_align_loss on one (batch, head) or a part of it: blocks of queries walk over tiles of keys, so that no more
// than a tile of either attention map exists at any time. Operands are converted once per block into scratch.
#include "attn_rows.h"
#include "attn_tiles.h"
#include "kernels.h"
#include "scratch.h"

namespace haste::cpu::HASTE_ISA {
namespace {

// Row strides in scratch. A key row is read in groups of kRows scalars, a query row in vectors.
HASTE_INLINE int64_t key_stride(int64_t dim) { return round_up(dim, kRows); }
template <class T>
HASTE_INLINE int64_t query_stride(int64_t dim) {
  return round_up(dim, kLanes<T>);
}
HASTE_INLINE int64_t padded_keys(int64_t keys) { return round_up(keys, kKeys); }

// The arrays of one block.
template <class T>
struct Workspace {
  T *student_k, *teacher_k;                             // [key][d]
  T *student_q, *teacher_q;                             // [query][d] of the current block of queries
  T *student_q_lanes, *teacher_q_lanes;                 // the same as [d][query]
  T *student_logits, *teacher_logits;                   // [key][query], one tile
  T *query_gradient, *key_gradient;                     // [d][query], [key][d]
  double student_k_divisor = 1, teacher_k_divisor = 1;  // see rescale_to_avoid_overflow()
  double student_q_divisor = 1, teacher_q_divisor = 1;
  OnlineSoftmax<T, kQueries<T>>* softmax;
  RowState<T, kQueries<T>>* rows;

  Workspace(const AttnAlignProblem& problem, int64_t keys, Scratch& scratch) {
    const int64_t student_dim = problem.student_q.dim, teacher_dim = problem.teacher_q.dim;
    const int64_t lanes = kQueries<T>;
    student_k = scratch.take<T>(padded_keys(keys) * key_stride(student_dim));
    teacher_k = scratch.take<T>(padded_keys(keys) * key_stride(teacher_dim));
    student_q = scratch.take<T>(lanes * query_stride<T>(student_dim));
    teacher_q = scratch.take<T>(lanes * query_stride<T>(teacher_dim));
    student_q_lanes = scratch.take<T>(lanes * query_stride<T>(student_dim));
    teacher_q_lanes = scratch.take<T>(lanes * query_stride<T>(teacher_dim));
    student_logits = scratch.take<T>(kKeys * lanes);
    teacher_logits = scratch.take<T>(kKeys * lanes);
    query_gradient = scratch.take<T>(round_up(key_stride(student_dim), kLanes<T>) * lanes);
    key_gradient = scratch.take<T>(padded_keys(keys) * query_stride<T>(student_dim));
    softmax = scratch.take<OnlineSoftmax<T, kQueries<T>>>(1);
    rows = scratch.take<RowState<T, kQueries<T>>>(1);
  }
};

template <class T>
void pack_keys(const AttnAlignProblem& problem, const AttnBlock& block, Workspace<T>& work) {
  const int64_t keys = block.key_end - block.key_begin;
  pack_tokens(problem.student_k, block, block.key_begin, keys, padded_keys(keys), work.student_k,
              key_stride(problem.student_k.dim));
  pack_tokens(problem.teacher_k, block, block.key_begin, keys, padded_keys(keys), work.teacher_k,
              key_stride(problem.teacher_k.dim));
  work.student_k_divisor =
      rescale_to_avoid_overflow(work.student_k, padded_keys(keys) * key_stride(problem.student_k.dim));
  work.teacher_k_divisor =
      rescale_to_avoid_overflow(work.teacher_k, padded_keys(keys) * key_stride(problem.teacher_k.dim));
}

// Returns by how much the lanes were divided; the rows are as they were.
template <class T>
double pack_queries(const AttnOperand& q, const AttnBlock& block, int64_t first, int64_t count, T* rows, T* lanes) {
  const int64_t stride = query_stride<T>(q.dim);
  pack_tokens(q, block, first, count, kQueries<T>, rows, stride);
  transpose(rows, stride, kQueries<T>, stride, lanes, kQueries<T>);
  return rescale_to_avoid_overflow(lanes, stride * kQueries<T>);
}

template <class T>
void pack_queries(const AttnAlignProblem& problem, const AttnBlock& block, int64_t first, int64_t count,
                  Workspace<T>& work) {
  work.student_q_divisor = pack_queries(problem.student_q, block, first, count, work.student_q, work.student_q_lanes);
  work.teacher_q_divisor = pack_queries(problem.teacher_q, block, first, count, work.teacher_q, work.teacher_q_lanes);
}

// A factor as T, the largest number where it overflows.
template <class T>
HASTE_INLINE T finite(double factor) {
  constexpr double largest = sizeof(T) == sizeof(float) ? 3.4e38 : 1.7e308;
  return T(factor > largest ? largest : factor < -largest ? -largest : factor);
}

// Both tiles of logits for the packed queries, from `query` on, and `count` packed keys from `first` on.
template <class T>
HASTE_INLINE void logits(const AttnAlignProblem& problem, const AttnBlock& block, int64_t query, int64_t first,
                         int64_t count, Workspace<T>& work) {
  const int64_t student_dim = problem.student_q.dim, teacher_dim = problem.teacher_q.dim;
  logits(work.student_k + first * key_stride(student_dim), key_stride(student_dim), count, work.student_q_lanes,
         student_dim, finite<T>(problem.student_scale * work.student_k_divisor * work.student_q_divisor),
         work.student_logits);
  logits(work.teacher_k + first * key_stride(teacher_dim), key_stride(teacher_dim), count, work.teacher_q_lanes,
         teacher_dim, finite<T>(problem.teacher_scale * work.teacher_k_divisor * work.teacher_q_divisor),
         work.teacher_logits);
  for (T* tile : {work.student_logits, work.teacher_logits}) {
    hide_keys<kQueries<T>>(problem, query, block.key_begin + first, count, kHiddenLogit<T>, tile);
  }
}

template <class T, bool kKl>
void forward_of(const AttnAlignProblem& problem, const AttnAlignRows& rows, const AttnBlock& block, void* memory) {
  Scratch scratch(memory);
  const int64_t keys = block.key_end - block.key_begin;
  Workspace<T> work(problem, keys, scratch);
  pack_keys(problem, block, work);

  for (int64_t query = block.query_begin; query < block.query_end; query += kQueries<T>) {
    const int64_t queries = least(kQueries<T>, block.query_end - query);
    pack_queries(problem, block, query, queries, work);
    const int64_t keys_seen = keys_in_sight(problem, block, query + queries);
    work.softmax->reset();
    for (int64_t key = 0; key < keys_seen; key += kKeys) {
      const int64_t count = least(kKeys, keys_seen - key);
      logits(problem, block, query, key, count, work);
      work.softmax->template update<kKl>(work.student_logits, 1, work.teacher_logits, 1, count, exp<T>);
    }
    work.softmax->template finish<kKl>(rows, first_row(problem, block) + query, 1, queries);
  }
}

template <class T>
void forward(const AttnAlignProblem& problem, const AttnAlignRows& rows, const AttnBlock& block, void* memory) {
  problem.kl ? forward_of<T, true>(problem, rows, block, memory) : forward_of<T, false>(problem, rows, block, memory);
}

// The student's logits become their gradient, grad_out · (e^{s − max_s} / Σ_s − e^{t − max_t} / Σ_t).
template <class T>
void logit_gradient(const RowState<T, kQueries<T>>& rows, int64_t keys, Workspace<T>& work) {
  for (int i = 0; i < kQueries<T>; i += kLanes<T>) {
    T *s = work.student_logits + i, *t = work.teacher_logits + i;
    const Vector<T> student_max = load(rows.student_max + i), student_factor = load(rows.student_factor + i);
    const Vector<T> teacher_max = load(rows.teacher_max + i), teacher_factor = load(rows.teacher_factor + i);
    for (int64_t key = 0; key < keys; ++key, s += kQueries<T>, t += kQueries<T>) {
      store(s, exp<T>(load(s) - student_max) * student_factor - exp<T>(load(t) - teacher_max) * teacher_factor);
    }
  }
}

template <class T>
void clear(T* array, int64_t count) {
  for (int64_t i = 0; i < count; ++i) array[i] = 0;
}

template <class T>
void backward(const AttnAlignProblem& problem, const AttnAlignBackward& gradient, const AttnBlock& block,
              void* memory) {
  Scratch scratch(memory);
  const int64_t keys = block.key_end - block.key_begin, dim = problem.student_q.dim;
  const int64_t k_stride = key_stride(dim), q_stride = query_stride<T>(dim);
  const bool query_wanted = gradient.student_q.data, key_wanted = gradient.student_k.data;
  Workspace<T> work(problem, keys, scratch);
  pack_keys(problem, block, work);
  clear(work.key_gradient, padded_keys(keys) * q_stride);

  for (int64_t query = block.query_begin; query < block.query_end; query += kQueries<T>) {
    const int64_t queries = least(kQueries<T>, block.query_end - query);
    // In whole kKeyGradientRows: what is left over in the rows of a tile past its last key must not reach dk.
    const int64_t keys_seen = least(round_up(keys_in_sight(problem, block, query + queries), kKeyGradientRows), keys);
    if (keys_seen == 0) continue;  // where the block holds some of the keys, there is no dq to write
    pack_queries(problem, block, query, queries, work);
    work.rows->load_rows(problem, gradient, block, query, queries);
    clear(work.query_gradient, round_up(k_stride, kLanes<T>) * kQueries<T>);
    for (int64_t key = 0; key < keys_seen; key += kKeys) {
      const int64_t count = least(kKeys, keys_seen - key);
      logits(problem, block, query, key, count, work);
      logit_gradient(*work.rows, count, work);
      if (query_wanted) {
        add_query_gradient(work.student_k + key * k_stride, k_stride, count, work.student_logits, dim,
                           work.query_gradient);
      }
      if (key_wanted) {
        add_key_gradient(work.student_logits, count, work.student_q, q_stride, queries,
                         work.key_gradient + key * q_stride);
      }
    }
    if (query_wanted) {
      transpose(work.query_gradient, kQueries<T>, q_stride, kQueries<T>, work.student_q, q_stride);
      unpack_tokens(work.student_q, q_stride, finite<T>(problem.student_scale * work.student_k_divisor), dim,
                    gradient.student_q, problem.student_q.type, block, query, queries);
    }
  }
  if (key_wanted) {
    unpack_tokens(work.key_gradient, q_stride, T(problem.student_scale), dim, gradient.student_k,
                  problem.student_k.type, block, block.key_begin, keys);
  }
}

template <class T>
size_t scratch_bytes(const AttnAlignProblem& problem, int64_t keys) {
  Scratch counter(nullptr);
  Workspace<T>(problem, keys, counter);
  return counter.used();
}

}  // namespace

template <class T>
AttnAlignKernels attn_align_loss() {
  return {scratch_bytes<T>, forward<T>, backward<T>};
}
template AttnAlignKernels attn_align_loss<HASTE_COMPUTE>();

}  // namespace haste::cpu::HASTE_ISA
