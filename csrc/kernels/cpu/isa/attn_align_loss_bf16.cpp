// attn_align_loss of bf16 operands where the processor multiplies them: on AMX tiles, or by AVX-512's vdpbf16ps. The
// exponentials weigh much here, so they are shorter than elsewhere: 3e-6, a thousandth of what bf16 resolves. What
// falls outside (other types, fewer tokens than a vector has lanes, a scale that is not positive, logits beyond
// kLargestHere) is left to the AVX-512 kernel.
#if defined(__AMX_BF16__)
#include "bf16_amx.h"
#else
#include "bf16_avx512.h"
#endif
#include "attn_rows.h"
#include "kernels.h"
#include "scratch.h"

namespace haste::cpu::HASTE_ISA {
namespace {

constexpr int kQueries = 64;    // of a block
constexpr int kStrip = 32;      // keys whose logits exist at a time: with the teacher's, 16 KB
constexpr int kKeyBlock = 256;  // keys over which dq is summed in registers
static_assert(kStrip % kRows == 0 && kStrip % kDepth == 0, "whole strips on both sides of a product");
constexpr float kLargestHere = 1e4f;
constexpr float kHiddenHere = -1e5f;  // of a key that a query does not see: its power is 0 beside that of any logit
constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;

typedef Vector<float> V;
constexpr int L = kLanes<float>;

HASTE_INLINE int64_t padded_keys(int64_t keys) { return round_up(keys, kStrip); }

// 2^y for y up to 127, exactly 1 at 0: 2^n · 2^f with y = n + f. Underflows to less than 2^-125, NaN stays NaN.
HASTE_INLINE V exp2_short(V y) {
#if defined(__AMX_BF16__)  // Intel's cores take n and f apart and put them together in an instruction each
  const V f = V(_mm512_reduce_ps(__m512(y), _MM_FROUND_TO_NEG_INF));
  const V p = (((f * 0.0134271268f + 0.0522417638f) * f + 0.241280537f) * f + 0.693044803f) * f + 1.0f;
  return V(_mm512_scalef_ps(__m512(p), __m512(y)));
#else  // AMD's take two cycles for those, and add beside multiplying
  constexpr float round = 0x1.8p23f;  // adding it leaves an integer in the lowest bits
  const V clamped = max<float>(broadcast(-126.0f), y);
  const V shifted = clamped + round;
  const V f = clamped - (shifted - round);
  const V p = (((f * 0.009582853043f + 0.05590642458f) * f + 0.2402409861f) * f + 0.6931241934f) * f + 1.0f;
  return V(Bits<float>(p) + (Bits<float>(shifted) << 23));
#endif
}

// Rows of bf16 as they are, padded with zeros to whole kWord. Returns whether all of their numbers are finite.
bool pack_rows(const AttnOperand& x, const AttnBlock& block, int64_t first, int64_t count, int64_t padded,
               uint16_t* to) {
  constexpr int64_t kAhead = 16;
  const int64_t stride = round_up(x.dim, kWord);
  const __m512i exponent = _mm512_set1_epi16(0x7f80);
  __mmask32 not_finite = 0;
  const uint16_t* from = static_cast<const uint16_t*>(x.data) + block.batch * x.stride_batch +
                         block.head * x.stride_head + first * x.stride_token;
  for (int64_t i = 0; i < padded; ++i, from += x.stride_token) {
    if (i + kAhead < count) prefetch(from + kAhead * x.stride_token, x.dim);
    if (i < count) prefetch(from + x.stride_head, x.dim);  // most often the thread's next task
    for (int64_t d = 0; d < stride; d += kWord) {
      const int64_t inside = i < count ? least(x.dim - d, kWord) : 0;
      const __m512i row = _mm512_maskz_loadu_epi16(__mmask32((uint64_t(1) << inside) - 1), from + d);
      _mm512_storeu_si512(to + i * stride + d, row);
      not_finite |= _mm512_cmpeq_epi16_mask(_mm512_and_si512(row, exponent), exponent);
    }
  }
  return not_finite == 0;
}

// Student or teacher: the keys of an AttnBlock, and one block of its queries.
struct Side {
  const AttnOperand &q_operand, &k_operand;
  const int64_t stride;  // of a packed row
  const float factor;    // what the products are to be multiplied with to be powers of two
  uint16_t *k, *q;       // [key][d], [query][d]
  uint32_t* q_lanes;     // pairs of d × queries, the right operand of the logits
  float* logits;         // [key][query], one strip, without the factor

  Side(const AttnOperand& q_operand, const AttnOperand& k_operand, double scale, int64_t keys, Scratch& scratch)
      : q_operand(q_operand),
        k_operand(k_operand),
        stride(round_up(q_operand.dim, kWord)),
        factor(float(scale * kLog2E)),
        k(scratch.take<uint16_t>(padded_keys(keys) * stride)),
        q(scratch.take<uint16_t>(kQueries * stride)),
        q_lanes(scratch.take<uint32_t>(kQueries * stride / 2)),
        logits(scratch.take<float>(kStrip * kQueries)) {}

  bool pack_keys(const AttnBlock& block) {
    const int64_t keys = block.key_end - block.key_begin;
    return pack_rows(k_operand, block, block.key_begin, keys, padded_keys(keys), k);
  }

  void pack_queries(const AttnBlock& block, int64_t first, int64_t count) {
    pack_rows(q_operand, block, first, count, kQueries, q);
    transpose(reinterpret_cast<const uint32_t*>(q), stride / 2, kQueries, stride / 2, q_lanes, kQueries);
  }

  // The queries packed, from `query` on, and `count` keys from `first` on.
  HASTE_INLINE void multiply_strip(const AttnAlignProblem& problem, const AttnBlock& block, int64_t query,
                                   int64_t first, int64_t count) {
    multiply<false>({k + first * stride, stride}, {q_lanes, kQueries}, round_up(count, kRows), kQueries,
                    round_up(q_operand.dim, kDepth), {logits, kQueries});
    hide_keys<kQueries>(problem, query, block.key_begin + first, count, kHiddenHere / factor, logits);
  }
};

HASTE_INLINE bool within_reach(float x) { return x < kLargestHere && x > -kLargestHere; }

// Whether the largest logit of a row is.
HASTE_INLINE bool row_within_reach(const void* softmax, int64_t row) {
  return within_reach(static_cast<const float*>(softmax)[2 * row]);
}

// Returns false, with rows that do not count, where a logit was too large (or not a number) for this kernel. Those of an
// infinite query show in their row; that of an infinite key may be −∞, in which nothing shows.
template <bool kKl>
bool forward_of(const AttnAlignProblem& problem, const AttnAlignRows& rows, const AttnBlock& block, void* memory) {
  Scratch scratch(memory);
  const int64_t keys = block.key_end - block.key_begin;
  Side student(problem.student_q, problem.student_k, problem.student_scale, keys, scratch);
  Side teacher(problem.teacher_q, problem.teacher_k, problem.teacher_scale, keys, scratch);
  const bool student_finite = student.pack_keys(block), teacher_finite = teacher.pack_keys(block);
  if (!student_finite || !teacher_finite) return false;

  const Engine engine;
  OnlineSoftmax<float, kQueries> softmax;
  for (int64_t query = block.query_begin; query < block.query_end; query += kQueries) {
    const int64_t queries = least(kQueries, block.query_end - query);
    student.pack_queries(block, query, queries);
    teacher.pack_queries(block, query, queries);
    const int64_t keys_seen = keys_in_sight(problem, block, query + queries);
    softmax.reset();
    for (int64_t key = 0; key < keys_seen; key += kStrip) {
      const int64_t count = least(kStrip, keys_seen - key);
      student.multiply_strip(problem, block, query, key, count);
      teacher.multiply_strip(problem, block, query, key, count);
      softmax.update<kKl>(student.logits, student.factor, teacher.logits, teacher.factor, count, exp2_short);
    }
    const int64_t row = first_row(problem, block) + query;
    softmax.finish<kKl>(rows, row, kLn2, queries);
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
  const int64_t rows, width, keys;  // dim in whole kRows, and in whole vectors
  uint16_t* g;                      // [key][query], left operand of dk
  uint32_t* g_pairs;                // pairs of keys × queries, right operand of dq
  uint16_t* k_lanes;                // [d][key], left operand of dq
  uint32_t* q_pairs;                // pairs of queries × d, right operand of dk
  float *dq_lanes, *dq;             // [d][query], [query][d]
  float* dk;                        // [key][d]
  uint32_t* key_pairs;              // kWord keys on their way to k_lanes

  GradientWork(const AttnOperand& k, int64_t key_count, Scratch& scratch)
      : rows(round_up(k.dim, kRows)), width(round_up(k.dim, L)), keys(padded_keys(key_count)) {
    const int64_t stride = round_up(k.dim, kWord);
    g = scratch.take<uint16_t>(kKeyBlock * kQueries);
    g_pairs = scratch.take<uint32_t>(kKeyBlock / 2 * kQueries);
    k_lanes = scratch.take<uint16_t>(stride * keys);
    q_pairs = scratch.take<uint32_t>(kQueries / 2 * stride);
    dq_lanes = scratch.take<float>(width * kQueries);
    dq = scratch.take<float>(width * kQueries);
    dk = scratch.take<float>(keys * width);
    key_pairs = scratch.take<uint32_t>(kWord / 2 * stride);
  }

  void pack_keys(const Side& student) {
    for (int64_t key = 0; key < keys; key += kWord) {
      pair_rows(student.k + key * student.stride, kWord, student.stride, key_pairs);
      transpose(key_pairs, student.stride, kWord / 2, student.stride, reinterpret_cast<uint32_t*>(k_lanes) + key / 2,
                keys / 2);
    }
    for (int64_t i = 0; i < keys * width; ++i) dk[i] = 0;
  }

  void pack_queries(const Side& student) {
    pair_rows(student.q, kQueries, student.stride, q_pairs);
    for (int64_t i = 0; i < kQueries * width; ++i) dq_lanes[i] = 0;
  }

  // Rows to words of two rows each.
  static void pair_rows(const uint16_t* rows, int64_t count, int64_t stride, uint32_t* pairs) {
    for (int64_t row = 0; row < count; row += 2) {
      for (int64_t d = 0; d < stride; d += kWord) {
        store_pairs(_mm512_loadu_si512(rows + row * stride + d), _mm512_loadu_si512(rows + (row + 1) * stride + d),
                    pairs + row / 2 * stride + d);
      }
    }
  }
};

// What backward knows of a block of queries, the maxima in powers of two.
struct Rows {
  RowState<float, kQueries> state;
  float factor_s, factor_t;

  // grad_out · (e^{s − max_s} / Σ_s − e^{t − max_t} / Σ_t) of L queries from `i` on.
  HASTE_INLINE V gradient(const float* s, const float* t, int i) const {
    return exp2_short(load(s + i) * factor_s - load(state.student_max + i)) * load(state.student_factor + i) -
           exp2_short(load(t + i) * factor_t - load(state.teacher_max + i)) * load(state.teacher_factor + i);
  }
};

// The strip of logits at hand becomes rows `first` to first + round_up(count, kStrip) of g; zeros past count.
void round_gradient(const Rows& rows, const Side& student, const Side& teacher, int64_t first, int64_t count,
                    GradientWork& work) {
  for (int i = 0; i < kQueries; i += 2 * L) {
    for (int64_t key = 0; key < round_up(count, kStrip); key += 2) {
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

void backward_of(const AttnAlignProblem& problem, const AttnAlignBackward& gradient, const AttnBlock& block,
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

  const Engine engine;
  Rows rows;
  rows.factor_s = student.factor;
  rows.factor_t = teacher.factor;
  for (int64_t query = block.query_begin; query < block.query_end; query += kQueries) {
    const int64_t queries = least(kQueries, block.query_end - query);
    const int64_t keys_seen = keys_in_sight(problem, block, query + queries);
    if (keys_seen == 0) continue;  // where the block holds some of the keys, there is no dq to write
    student.pack_queries(block, query, queries);
    teacher.pack_queries(block, query, queries);
    work.pack_queries(student);
    rows.state.load_rows(problem, gradient, block, query, queries);
    for (int i = 0; i < kQueries; ++i) {
      rows.state.student_max[i] *= kLog2E;
      rows.state.teacher_max[i] *= kLog2E;
    }
    for (int64_t first = 0; first < keys_seen; first += kKeyBlock) {
      const int64_t block_keys = least(kKeyBlock, keys_seen - first);
      for (int64_t key = 0; key < block_keys; key += kStrip) {
        const int64_t count = least(kStrip, block_keys - key);
        student.multiply_strip(problem, block, query, first + key, count);
        teacher.multiply_strip(problem, block, query, first + key, count);
        round_gradient(rows, student, teacher, key, count, work);
      }
      const int64_t depth = round_up(block_keys, kStrip);
      if (query_wanted) {
        multiply<true>({work.k_lanes + first, work.keys}, {work.g_pairs, kQueries}, work.rows, kQueries, depth,
                       {work.dq_lanes, kQueries});
      }
      if (key_wanted) {
        multiply<true>({work.g, kQueries}, {work.q_pairs, student.stride}, depth, work.width, kQueries,
                       {work.dk + first * work.width, work.width});
      }
    }
    if (query_wanted) {
      transpose(work.dq_lanes, kQueries, work.width, kQueries, work.dq, work.width);
      unpack_tokens(work.dq, work.width, float(problem.student_scale), dim, gradient.student_q, ScalarType::BFloat16,
                    block, query, queries);
    }
  }
  if (key_wanted) {
    unpack_tokens(work.dk, work.width, float(problem.student_scale), dim, gradient.student_k, ScalarType::BFloat16,
                  block, block.key_begin, keys);
  }
}

HASTE_INLINE bool for_engine(const AttnAlignProblem& problem) {
  const auto positive = [](double scale) { return scale > 1e-6 && scale < 1e6; };
  return problem.student_q.type == ScalarType::BFloat16 && problem.teacher_q.type == ScalarType::BFloat16 &&
         problem.tokens >= L && positive(problem.student_scale) && positive(problem.teacher_scale);
}

// Of all queries of the (batch, head), so that every block of it is computed in the same way.
bool maxima_within_reach(const AttnAlignProblem& problem, const AttnAlignBackward& gradient, const AttnBlock& block) {
  bool good = true;
  for (int64_t i = first_row(problem, block); i < first_row(problem, block) + problem.tokens; ++i) {
    good &= row_within_reach(gradient.student_softmax, i) && row_within_reach(gradient.teacher_softmax, i);
  }
  return good;
}

const AttnAlignKernels& otherwise() {
  static const AttnAlignKernels kernels = avx512::attn_align_loss<float>();
  return kernels;
}

size_t scratch_bytes(const AttnAlignProblem& problem, int64_t keys) {
  Scratch counter(nullptr);
  Side(problem.student_q, problem.student_k, problem.student_scale, keys, counter);
  Side(problem.teacher_q, problem.teacher_k, problem.teacher_scale, keys, counter);
  GradientWork(problem.student_k, keys, counter);
  const size_t bytes = otherwise().scratch(problem, keys);
  return for_engine(problem) && counter.used() > bytes ? counter.used() : bytes;
}

void forward(const AttnAlignProblem& problem, const AttnAlignRows& rows, const AttnBlock& block, void* scratch) {
  const auto run = problem.kl ? forward_of<true> : forward_of<false>;
  if (!for_engine(problem) || !run(problem, rows, block, scratch)) otherwise().forward(problem, rows, block, scratch);
}

void backward(const AttnAlignProblem& problem, const AttnAlignBackward& gradient, const AttnBlock& block,
              void* scratch) {
  if (for_engine(problem) && maxima_within_reach(problem, gradient, block)) {
    backward_of(problem, gradient, block, scratch);
  } else {
    otherwise().backward(problem, gradient, block, scratch);
  }
}

}  // namespace

template <>
AttnAlignKernels attn_align_loss<float>() {
  return {scratch_bytes, forward, backward};
}

}  // namespace haste::cpu::HASTE_ISA
