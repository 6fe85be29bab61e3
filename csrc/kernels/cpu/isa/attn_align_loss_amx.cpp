// attn_align_loss of bf16 operands on AMX tiles. The products cost so little here that the exponentials set the pace,
// so these are shorter than elsewhere: 3e-6, a thousandth of what bf16 resolves. What falls outside (other types,
// fewer tokens than a tile has rows, a scale that is not positive, logits beyond kLargestHere) is left to the AVX-512
// kernel.
#include "amx_tiles.h"
#include "attn_rows.h"
#include "kernels.h"
#include "scratch.h"

namespace haste::cpu::HASTE_ISA {
namespace {

constexpr int kQueries = 64;    // of a block
constexpr int kStrip = 32;      // keys whose logits exist at a time: with the teacher's, 16 KB
constexpr int kKeyBlock = 256;  // keys over which dq is summed in tile registers
constexpr float kLargestHere = 1e4f;
constexpr float kLog2E = 1.44269504f;

typedef Vector<float> V;
constexpr int L = kLanes<float>;

HASTE_INLINE int64_t padded_keys(int64_t keys) { return round_up(keys, kStrip); }

// 2^y, exactly 1 at 0: a polynomial in the fraction of y, scaled by its integer part. Underflows to 0, NaN stays NaN.
HASTE_INLINE V exp2_short(V y) {
  const V f = V(_mm512_reduce_ps(__m512(y), _MM_FROUND_TO_NEG_INF));
  const V p = (((f * 0.0134271268f + 0.0522417638f) * f + 0.241280537f) * f + 0.693044803f) * f + 1.0f;
  return V(_mm512_scalef_ps(__m512(p), __m512(y)));
}

// Rows of bf16 as they are, padded with zeros to whole kDepth.
void pack_rows(const AttnOperand& x, const AttnBlock& block, int64_t first, int64_t count, int64_t padded,
               uint16_t* to) {
  constexpr int64_t kAhead = 16;
  const int64_t depth = round_up(x.dim, kDepth);
  const uint16_t* from = static_cast<const uint16_t*>(x.data) + block.batch * x.stride_batch +
                         block.head * x.stride_head + first * x.stride_token;
  for (int64_t i = 0; i < padded; ++i, from += x.stride_token) {
    if (i + kAhead < count) read_ahead(from + kAhead * x.stride_token, x.dim);
    for (int64_t d = 0; d < depth; d += kDepth) {
      const int64_t inside = i < count ? least(x.dim - d, kDepth) : 0;
      const __m512i row = _mm512_maskz_loadu_epi16(__mmask32((uint64_t(1) << inside) - 1), from + d);
      _mm512_storeu_si512(to + i * depth + d, row);
    }
  }
}

// Student or teacher: the keys of an AttnBlock, and one block of its queries.
struct Side {
  const AttnOperand &q_operand, &k_operand;
  const int64_t depth;
  const float scale;
  uint16_t *k, *q;    // [key][d], [query][d]
  uint32_t* q_lanes;  // pairs of d × queries, the right operand of the logits
  float* logits;      // [key][query], one strip, to be scaled yet

  Side(const AttnOperand& q_operand, const AttnOperand& k_operand, double scale, int64_t keys, Scratch& scratch)
      : q_operand(q_operand), k_operand(k_operand), depth(round_up(q_operand.dim, kDepth)), scale(float(scale)),
        k(scratch.take<uint16_t>(padded_keys(keys) * depth)), q(scratch.take<uint16_t>(kQueries * depth)),
        q_lanes(scratch.take<uint32_t>(kQueries * depth / 2)), logits(scratch.take<float>(kStrip * kQueries)) {}

  void pack_keys(const AttnBlock& block) {
    const int64_t keys = block.key_end - block.key_begin;
    pack_rows(k_operand, block, block.key_begin, keys, padded_keys(keys), k);
  }

  void pack_queries(const AttnBlock& block, int64_t first, int64_t count) {
    pack_rows(q_operand, block, first, count, kQueries, q);
    transpose(reinterpret_cast<const uint32_t*>(q), depth / 2, kQueries, depth / 2, q_lanes, kQueries);
  }

  // Of `count` keys from `first` on.
  HASTE_INLINE void multiply_strip(int64_t first, int64_t count) {
    multiply<false>({k + first * depth, depth}, {q_lanes, kQueries}, round_up(count, kTile), kQueries, depth,
                    {logits, kQueries});
  }
};

HASTE_INLINE bool within_reach(float x) { return x < kLargestHere && x > -kLargestHere; }

// Whether the largest logit of a row is.
HASTE_INLINE bool row_within_reach(const void* softmax, int64_t row) {
  return within_reach(static_cast<const float*>(softmax)[2 * row]);
}

// Returns false, with rows that do not count, where a logit was too large (or not a number) for this kernel.
bool forward(const AttnAlignProblem& problem, const AttnAlignRows& rows, const AttnBlock& block, void* memory) {
  Scratch scratch(memory);
  const int64_t keys = block.key_end - block.key_begin;
  Side student(problem.student_q, problem.student_k, problem.student_scale, keys, scratch);
  Side teacher(problem.teacher_q, problem.teacher_k, problem.teacher_scale, keys, scratch);
  student.pack_keys(block);
  teacher.pack_keys(block);

  const auto exp_s = [factor = student.scale * kLog2E](V x) { return exp2_short(x * factor); };
  const auto exp_t = [factor = teacher.scale * kLog2E](V x) { return exp2_short(x * factor); };

  const Tiles tiles;
  OnlineSoftmax<float, kQueries> softmax;
  for (int64_t query = block.query_begin; query < block.query_end; query += kQueries) {
    const int64_t queries = least(kQueries, block.query_end - query);
    student.pack_queries(block, query, queries);
    teacher.pack_queries(block, query, queries);
    softmax.reset();
    for (int64_t key = 0; key < keys; key += kStrip) {
      const int64_t count = least(kStrip, keys - key);
      student.multiply_strip(key, count);
      teacher.multiply_strip(key, count);
      softmax.update(student.logits, teacher.logits, count, exp_s, exp_t);
    }
    const int64_t row = first_row(problem, block) + query;
    softmax.finish(rows, row, student.scale, teacher.scale, queries);
    for (int64_t i = row; i < row + queries; ++i) {
      if (!(within_reach(static_cast<const float*>(rows.loss)[i]) && row_within_reach(rows.student_softmax, i) &&
            row_within_reach(rows.teacher_softmax, i))) {
        return false;
      }
    }
  }
  return true;
}

// The gradient of the logits of a block of queries and kKeyBlock keys, rounded once to bf16, in the two layouts in
// which it is multiplied; and the other operands and the sums of those products.
struct GradientWork {
  const int64_t width, keys;
  uint16_t* g;           // [key][query], left operand of dk
  uint32_t* g_pairs;     // pairs of keys × queries, right operand of dq
  uint16_t* k_lanes;     // [d][key], left operand of dq
  uint32_t* q_pairs;     // pairs of queries × d, right operand of dk
  float *dq_lanes, *dq;  // [d][query], [query][d]
  float* dk;             // [key][d]
  uint32_t* key_pairs;   // kDepth keys on their way to k_lanes

  GradientWork(const AttnOperand& k, int64_t key_count, Scratch& scratch)
      : width(round_up(k.dim, kTile)), keys(padded_keys(key_count)) {
    const int64_t depth = round_up(k.dim, kDepth);
    g = scratch.take<uint16_t>(kKeyBlock * kQueries);
    g_pairs = scratch.take<uint32_t>(kKeyBlock / 2 * kQueries);
    k_lanes = scratch.take<uint16_t>(depth * keys);
    q_pairs = scratch.take<uint32_t>(kQueries / 2 * depth);
    dq_lanes = scratch.take<float>(width * kQueries);
    dq = scratch.take<float>(width * kQueries);
    dk = scratch.take<float>(keys * width);
    key_pairs = scratch.take<uint32_t>(kDepth / 2 * depth);
  }

  void pack_keys(const Side& student) {
    for (int64_t key = 0; key < keys; key += kDepth) {
      pair_rows(student.k + key * student.depth, kDepth, student.depth, key_pairs);
      transpose(key_pairs, student.depth, kDepth / 2, student.depth, reinterpret_cast<uint32_t*>(k_lanes) + key / 2,
                keys / 2);
    }
    for (int64_t i = 0; i < keys * width; ++i) dk[i] = 0;
  }

  void pack_queries(const Side& student) {
    pair_rows(student.q, kQueries, student.depth, q_pairs);
    for (int64_t i = 0; i < kQueries * width; ++i) dq_lanes[i] = 0;
  }

  // Rows to words of two rows each.
  static void pair_rows(const uint16_t* rows, int64_t count, int64_t depth, uint32_t* pairs) {
    for (int64_t row = 0; row < count; row += 2) {
      for (int64_t d = 0; d < depth; d += kDepth) {
        store_pairs(_mm512_loadu_si512(rows + row * depth + d), _mm512_loadu_si512(rows + (row + 1) * depth + d),
                    pairs + row / 2 * depth + d);
      }
    }
  }
};

// What backward knows of a block of queries, the maxima in powers of two.
struct Rows {
  RowState<float, kQueries> state;
  float factor_s, factor_t;

  // upstream · (e^{s − max_s} / Σ_s − e^{t − max_t} / Σ_t) of L queries from `i` on.
  HASTE_INLINE V gradient(const float* s, const float* t, int i) const {
    return exp2_short(load(s + i) * factor_s - load(state.student_max + i)) * load(state.student_factor + i) -
           exp2_short(load(t + i) * factor_t - load(state.teacher_max + i)) * load(state.teacher_factor + i);
  }
};

// The strip of logits at hand becomes rows `first` to first + round_up(count, kDepth) of g; zeros past count.
void round_gradient(const Rows& rows, const Side& student, const Side& teacher, int64_t first, int64_t count,
                    GradientWork& work) {
  for (int i = 0; i < kQueries; i += 2 * L) {
    for (int64_t key = 0; key < round_up(count, kDepth); key += 2) {
      const float *s = student.logits + key * kQueries, *t = teacher.logits + key * kQueries;
      __m512i pair[2] = {};
      for (int r = 0; r < 2; ++r, s += kQueries, t += kQueries) {
        if (key + r < count) {
          pair[r] = __m512i(_mm512_cvtne2ps_pbh(rows.gradient(s, t, i + L), rows.gradient(s, t, i)));
        }
        _mm512_storeu_si512(work.g + (first + key + r) * kQueries + i, pair[r]);
      }
      store_pairs(pair[0], pair[1], work.g_pairs + (first + key) / 2 * kQueries + i);
    }
  }
}

void backward(const AttnAlignProblem& problem, const AttnAlignBackward& gradient, const AttnBlock& block,
              void* memory) {
  Scratch scratch(memory);
  const int64_t keys = block.key_end - block.key_begin, dim = problem.student_q.dim;
  const bool query_wanted = gradient.student_q.data, key_wanted = gradient.student_k.data;
  Side student(problem.student_q, problem.student_k, problem.student_scale, keys, scratch);
  Side teacher(problem.teacher_q, problem.teacher_k, problem.teacher_scale, keys, scratch);
  GradientWork work(problem.student_k, keys, scratch);
  student.pack_keys(block);
  teacher.pack_keys(block);
  work.pack_keys(student);

  const Tiles tiles;
  Rows rows;
  rows.factor_s = student.scale * kLog2E;
  rows.factor_t = teacher.scale * kLog2E;
  for (int64_t query = block.query_begin; query < block.query_end; query += kQueries) {
    const int64_t queries = least(kQueries, block.query_end - query);
    student.pack_queries(block, query, queries);
    teacher.pack_queries(block, query, queries);
    work.pack_queries(student);
    rows.state.load_rows(problem, gradient, block, query, queries);
    for (int i = 0; i < kQueries; ++i) {
      rows.state.student_max[i] *= kLog2E;
      rows.state.teacher_max[i] *= kLog2E;
    }
    for (int64_t first = 0; first < keys; first += kKeyBlock) {
      const int64_t block_keys = least(kKeyBlock, keys - first);
      for (int64_t key = 0; key < block_keys; key += kStrip) {
        const int64_t count = least(kStrip, block_keys - key);
        student.multiply_strip(first + key, count);
        teacher.multiply_strip(first + key, count);
        round_gradient(rows, student, teacher, key, count, work);
      }
      const int64_t depth = round_up(block_keys, kDepth);
      if (query_wanted) {
        multiply<true>({work.k_lanes + first, work.keys}, {work.g_pairs, kQueries}, work.width, kQueries, depth,
                       {work.dq_lanes, kQueries});
      }
      if (key_wanted) {
        multiply<true>({work.g, kQueries}, {work.q_pairs, student.depth}, depth, work.width, kQueries,
                       {work.dk + first * work.width, work.width});
      }
    }
    if (query_wanted) {
      transpose(work.dq_lanes, kQueries, work.width, kQueries, work.dq, work.width);
      unpack_tokens(work.dq, work.width, student.scale, dim, gradient.student_q, ScalarType::BFloat16, block, query,
                    queries);
    }
  }
  if (key_wanted) {
    unpack_tokens(work.dk, work.width, student.scale, dim, gradient.student_k, ScalarType::BFloat16, block,
                  block.key_begin, keys);
  }
}

HASTE_INLINE bool for_tiles(const AttnAlignProblem& problem) {
  const auto positive = [](double scale) { return scale > 1e-6 && scale < 1e6; };
  return problem.student_q.type == ScalarType::BFloat16 && problem.teacher_q.type == ScalarType::BFloat16 &&
         problem.tokens >= kTile && positive(problem.student_scale) && positive(problem.teacher_scale);
}

// Of all queries of the (batch, head), so that every block of it is computed in the same way.
bool maxima_within_reach(const AttnAlignProblem& problem, const AttnAlignBackward& gradient, const AttnBlock& block) {
  bool good = true;
  for (int64_t i = first_row(problem, block); i < first_row(problem, block) + problem.tokens; ++i) {
    good &= row_within_reach(gradient.student_softmax, i) && row_within_reach(gradient.teacher_softmax, i);
  }
  return good;
}

}  // namespace

size_t attn_align_loss_scratch(const AttnAlignProblem& problem, int64_t keys) {
  Scratch scratch(nullptr);
  Side(problem.student_q, problem.student_k, problem.student_scale, keys, scratch);
  Side(problem.teacher_q, problem.teacher_k, problem.teacher_scale, keys, scratch);
  GradientWork(problem.student_k, keys, scratch);
  const size_t otherwise = avx512::attn_align_loss_scratch(problem, keys);
  return for_tiles(problem) && scratch.used() > otherwise ? scratch.used() : otherwise;
}

void attn_align_loss_forward(const AttnAlignProblem& problem, const AttnAlignRows& rows, const AttnBlock& block,
                             void* scratch) {
  if (!for_tiles(problem) || !forward(problem, rows, block, scratch)) {
    avx512::attn_align_loss_forward(problem, rows, block, scratch);
  }
}

void attn_align_loss_backward(const AttnAlignProblem& problem, const AttnAlignBackward& gradient,
                              const AttnBlock& block, void* scratch) {
  if (for_tiles(problem) && maxima_within_reach(problem, gradient, block)) {
    backward(problem, gradient, block, scratch);
  } else {
    avx512::attn_align_loss_backward(problem, gradient, block, scratch);
  }
}

}  // namespace haste::cpu::HASTE_ISA
