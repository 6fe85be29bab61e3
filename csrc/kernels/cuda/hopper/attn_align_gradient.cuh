// What the Hopper kernels of the backward of attn_align_loss share. All of them form, in registers,
//   G = 2^(s − m_s) / l_s − 2^(t − m_t) / l_t        s, t and their maxima m in powers of 2
// of a tile of 64 × 64 logits and multiply it onto a tile of the student's: dq_i += G_ij k_j, dk_j += Gᵀ_ji q_i. G is
// rounded to the operand type where it stands: accumulators of the logits are the A registers of the next product. Its
// range and grad_out: ../attn_align_grad_out.cuh.
//
// Of a *plain* tile a probability is one fused multiply-add and one power, 2^(s + o), with o = log2(2^14 / l_s) − m_s
// in one float. It needs grad_out to be one number per (batch, head), as that of a mean or sum is, so that
// no query has a weight; and maxima within kLargestPlainMaximum. The rounding of o, at most 2^−18 then, moves a
// probability by up to 2.6e-6 of itself. With a student within 1 % of its teacher, whose G is a hundredth of a
// probability, that is 1e-4 of G by norm and 5e-4 at most, beside the 1.7e-3 of its rounding to bf16. All other tiles
// keep m and 1 / l apart.
#pragma once

#include "../attn_align_grad_out.cuh"
#include "attn_align_launch.cuh"

namespace haste::cuda::hopper {

// Where one gradient goes.
struct Destination {
  AttnGradient rows;
  int tokens, dim;
  bool chunked;  // its rows may be written in 16-byte chunks
};

struct GradientArguments {
  PipelineArguments pipeline;
  const float2 *student_softmax, *teacher_softmax;  // {m, 1 / l} per row
  RowGradient grad_out;
  Destination student_q, student_k;
  float scale;  // the student's logit scale

  // Whether grad_out is one number per (batch, head): that of a mean or a sum, expanded.
  __device__ bool is_uniform() const { return grad_out.stride_token == 0; }
  __device__ const float* grad_out_of(const Place& place) const {
    return static_cast<const float*>(grad_out.data) + place.batch * grad_out.stride_batch +
           place.head * grad_out.stride_head;
  }
};

constexpr int kChunkBytes = 16;

// Up to here (in powers of 2) the maxima of a tile's logits let it be plain.
constexpr float kLargestPlainMaximum = 64.f;

// A sum that is NaN is not: its offset would look like the mark of a tile that is not plain.
__device__ inline bool is_plain(float2 softmax) {
  return fabsf(softmax.x) <= kLargestPlainMaximum && softmax.y == softmax.y;
}

// o of one query, from its {maximum, 1 / sum}; −∞, whose power is 0, where there is no query.
__device__ inline float offset_of(float2 softmax) {
  constexpr float kFactorLog2 = 14.f;
  static_assert(kGradientFactor<__half> == 16384.f && kGradientFactor<__nv_bfloat16> == 16384.f);
  return log2f(softmax.y) + kFactorLog2 - softmax.x;
}

// A logit's probability, times what G carries. `query`: {o, -} of a plain tile, else {maximum, factor / sum}.
template <bool kPlain>
__device__ inline float probability(float dot, float scale_log2, float2 query) {
  if constexpr (kPlain) return fast_exp2(fmaf(dot, scale_log2, query.x));
  // What overflowed was held to a finite maximum and is above it here.
  return query.y * fast_exp2(fminf(fmaf(dot, scale_log2, -query.x), kLargestRounding));
}

// What the producer adds to a stage of 64 queries.
struct QueryStatistics {
  float student_offset[kTileRows], teacher_offset[kTileRows];  // NaN unless the tile is plain, which needs no more
  float2 student[kTileRows], teacher[kTileRows];               // {maximum, factor / sum}
  float weight[kTileRows];                                     // g_i / g_ref
  float4 reference;                                            // .x: g_ref
};

// kWeighted: the statistics have the weight in them.
template <bool kWeighted>
class StatisticsLoader {
 public:
  __device__ explicit StatisticsLoader(const GradientArguments& arguments) : arguments_(arguments) {}

  __device__ void prepare(const Place& place, int first_row) {
    const float* grad_out = arguments_.grad_out_of(place);
    bool plain = arguments_.is_uniform();
    if (first_row == 0) {
      if (plain) {
        reference_.value = *grad_out;
      } else {
        reference_ = GradOutReference(grad_out, arguments_.grad_out.stride_token, arguments_.pipeline.tokens);
      }
    }
#pragma unroll
    for (int i = 0; i < kRowsPerLane; ++i) {
      const int row = first_row + threadIdx.x % kWarpSize + i * kWarpSize;
      student_[i] = teacher_[i] = {0.f, 0.f};  // past the last query: its G is 0
      weight_[i] = 0.f;
      if (row >= arguments_.pipeline.tokens) continue;
      weight_[i] = 1.f;
      if (!arguments_.is_uniform()) weight_[i] = grad_out[row * arguments_.grad_out.stride_token] * reference_.inverse;
      student_[i] = arguments_.student_softmax[place.first_of_head + row];
      teacher_[i] = arguments_.teacher_softmax[place.first_of_head + row];
      plain &= is_plain(student_[i]) && is_plain(teacher_[i]);
    }
    plain_ = !__any_sync(kFullWarp, !plain);
#pragma unroll
    for (int i = 0; i < kRowsPerLane; ++i) {
      if (plain_) {
        student_[i].x = offset_of(student_[i]);
        teacher_[i].x = offset_of(teacher_[i]);
      } else {
        const float factor = (kWeighted ? weight_[i] : 1.f) * kGradientFactor<__half>;
        student_[i].y *= factor;
        teacher_[i].y *= factor;
      }
    }
  }

  __device__ void write(void* extra) const {
    auto& statistics = *static_cast<QueryStatistics*>(extra);
    const int lane = threadIdx.x % kWarpSize;
#pragma unroll
    for (int i = 0; i < kRowsPerLane; ++i) {
      const int row = lane + i * kWarpSize;
      statistics.student_offset[row] = plain_ ? student_[i].x : NAN;
      statistics.teacher_offset[row] = plain_ ? teacher_[i].x : NAN;
      if (plain_) continue;
      statistics.student[row] = student_[i];
      statistics.teacher[row] = teacher_[i];
      if (!kWeighted) statistics.weight[row] = weight_[i];
    }
    if (lane == 0 && !plain_) statistics.reference.x = reference_.value;
  }

 private:
  static constexpr int kRowsPerLane = kTileRows / kWarpSize;
  const GradientArguments& arguments_;
  GradOutReference reference_;
  float2 student_[kRowsPerLane], teacher_[kRowsPerLane];
  float weight_[kRowsPerLane];
  bool plain_ = false;
};

// A query per column of the tile: makes probabilities of its logits.
struct QueryColumns {
  const float* offsets;
  const float2* queries;

  // The same for all lanes. It reads what they need first: one value fewer to load than a flag.
  __device__ bool is_plain() const {
    const float offset = offsets[threadIdx.x % 4 * 2];
    return offset == offset;
  }

  template <bool kPlain>
  __device__ void to_probabilities(float (&c)[kCells][4], float scale_log2) const {
#pragma unroll
    for (int cell = 0; cell < kCells; ++cell) {
      const int pair = cell * 4 + threadIdx.x % 4;
      float2 query[2];
      if constexpr (kPlain) {
        const float2 both = reinterpret_cast<const float2*>(offsets)[pair];
        query[0].x = both.x;
        query[1].x = both.y;
      } else {
        const float4 both = reinterpret_cast<const float4*>(queries)[pair];
        query[0] = {both.x, both.y};
        query[1] = {both.z, both.w};
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) c[cell][i] = probability<kPlain>(c[cell][i], scale_log2, query[i % 2]);
    }
  }
};

// s −= t: probabilities become G.
__device__ inline void subtract(float (&s)[kCells][4], const float (&t)[kCells][4]) {
#pragma unroll
  for (int cell = 0; cell < kCells; ++cell) {
#pragma unroll
    for (int i = 0; i < 4; ++i) s[cell][i] -= t[cell][i];
  }
}

// Rounds a tile to T, as A registers for a contraction over its columns: two cells of 8 are a fragment as they stand.
template <typename T>
__device__ void pack_tile(uint32_t (&a)[kTileRows / kStep][4], const float (&c)[kCells][4]) {
#pragma unroll
  for (int step = 0; step < kTileRows / kStep; ++step) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float (&cell)[4] = c[2 * step + i / 2];
      a[step][i] = pack<T>(cell[i % 2 * 2], cell[i % 2 * 2 + 1]);
    }
  }
}

// c (+)= A·B over a contraction of 16: A in registers or, transposed, in shared memory, as B, 16 × (8·kDimCells).
template <typename T, int kDimCells>
__device__ void multiply_step(float (&c)[kDimCells][4], const uint32_t (&a)[4], uint64_t b, bool add) {
  wgmma<T, 8 * kDimCells, true>(c, a, b, add);
}
template <typename T, int kDimCells>
__device__ void multiply_step(float (&c)[kDimCells][4], uint64_t a, uint64_t b, bool add) {
  wgmma<T, 8 * kDimCells, true, true>(c, a, b, add);
}

// The same; kSplit: the columns of B's second panel by an instruction of their own, should wgmma not take columns that
// end within a panel behind a whole one.
template <typename T, bool kSplit, int kDimCells, typename A>
__device__ void multiply(float (&c)[kDimCells][4], const A& a, uint64_t b, bool add) {
  constexpr int kPanelCells = kPanelColumns / 8;
  if constexpr (kSplit && kDimCells > kPanelCells) {
    multiply_step<T>(reinterpret_cast<float (&)[kPanelCells][4]>(c[0]), a, b, add);
    multiply_step<T>(reinterpret_cast<float (&)[kDimCells - kPanelCells][4]>(c[kPanelCells]), a,
                     b + kPanelBytes / kDescriptorUnit, add);
  } else {
    multiply_step<T>(c, a, b, add);
  }
}

// c += G·B: G 64 × 64 in registers, B 64 × (8·kDimCells) in panels, contracted along its rows; a group of its own.
template <typename T, bool kSplit, int kDimCells>
__device__ void start_accumulation(float (&c)[kDimCells][4], const uint32_t (&g)[kTileRows / kStep][4], const char* b) {
  const uint64_t descriptor = columns_descriptor(b, kPanelBytes);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < kTileRows / kStep; ++step) {
    constexpr int kStepBytes = kStep * static_cast<int>(kPanelRowBytes);
    multiply<T, kSplit>(c, g[step], descriptor + step * kStepBytes / kDescriptorUnit, true);
  }
  wgmma_commit();
}

// Where a warp's row (0–15) has its 16-byte chunk in panels; `rows`: the panels' row 0 or another multiple of 8.
__device__ inline char* chunk_of(char* rows, int row, int chunk) {
  return rows + chunk / 8 * kPanelBytes + row * static_cast<int>(kPanelRowBytes) + (chunk % 8 ^ row % 8) * kChunkBytes;
}

// A held tile of one model, A of its products: where it lies, or, kRegisters, the warp's 16 rows of it in registers, so
// that products read shared memory for B alone.
template <typename T, int kSteps, bool kRegisters>
class HeldTile {
 public:
  __device__ void take(char* tile) {
    if constexpr (kRegisters) {
      const int lane = threadIdx.x % kWarpSize;
      tile += threadIdx.x / kWarpSize % kWarpgroupWarps * 16 * kPanelRowBytes;
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        load_matrices(fragments_[step], chunk_of(tile, lane % 16, 2 * step + lane / 16));
      }
    } else {
      tile_ = tile;
    }
  }

  __device__ void start_logits_with(float (&c)[kCells][4], const char* streamed) const {
    if constexpr (kRegisters) {
      start_logits<T>(c, fragments_, streamed);
    } else {
      start_logits<T, kSteps>(c, tile_, streamed);
    }
  }

 private:
  const char* tile_;
  uint32_t fragments_[kSteps][4];
};

// Rounds a consumer's 64 rows to T, lays them into `tile`, panels that nobody reads any more, and writes them out in
// whole rows. Every warp handles its own 16.
template <typename T, int kDimCells>
__device__ void store_rows(const float (&rows)[kDimCells][4], const float (&factors)[2], char* tile,
                           const Destination& destination, const Place& place, int first_row) {
  constexpr int kChunk = kChunkBytes / static_cast<int>(sizeof(T));
  const int lane = lane_index();
  tile += threadIdx.x / kWarpSize % kWarpgroupWarps * 16 * kPanelRowBytes;
  __syncwarp();
#pragma unroll
  for (int cell = 0; cell < kDimCells; cell += 2) {
    uint32_t words[4] = {};  // of an odd last cell, its neighbour is zeros
#pragma unroll
    for (int i = 0; i < 4 && cell + i / 2 < kDimCells; ++i) {
      const float (&pair)[4] = rows[cell + i / 2];
      words[i] = pack<T>(pair[i % 2 * 2] * factors[i % 2], pair[i % 2 * 2 + 1] * factors[i % 2]);
    }
    store_matrices(chunk_of(tile, lane % 16, cell + lane / 16), words);
  }
  __syncwarp();
  const AttnGradient& rows_of = destination.rows;
  T* head = static_cast<T*>(rows_of.data) + place.batch * rows_of.stride_batch + place.head * rows_of.stride_head;
  const bool chunked = destination.chunked;
  const int columns = chunked ? destination.dim / kChunk : destination.dim;  // of chunks, or of elements
  for (int i = lane; i < 16 * columns; i += kWarpSize) {
    const int row = i / columns, column = i % columns;
    if (first_row + row >= destination.tokens) break;
    T* target = head + (first_row + row) * rows_of.stride_token;
    if (chunked) {
      reinterpret_cast<uint4*>(target)[column] = *reinterpret_cast<const uint4*>(chunk_of(tile, row, column));
    } else {
      target[column] = reinterpret_cast<const T*>(chunk_of(tile, row, column / kChunk))[column % kChunk];
    }
  }
}

// Host side.

inline Destination describe_destination(const AttnAlignProblem& problem, const AttnGradient& gradient) {
  // What the copy engine could read, 16-byte accesses can write.
  const AttnOperand operand{gradient.data,         problem.student_q.type, problem.student_q.dim,
                            gradient.stride_batch, gradient.stride_head,   gradient.stride_token};
  const bool chunked = operand.dim % 8 == 0 && can_map(operand, problem.batch, problem.heads, problem.tokens);
  return {gradient, static_cast<int>(problem.tokens), static_cast<int>(operand.dim), chunked};
}

// `rows`: that a block holds at a time.
inline const char* describe_gradients(GradientArguments* arguments, const AttnAlignProblem& problem,
                                      const AttnAlignBackward& backward, bool hold_keys, int rows) {
  arguments->student_softmax = static_cast<const float2*>(backward.student_softmax);
  arguments->teacher_softmax = static_cast<const float2*>(backward.teacher_softmax);
  arguments->grad_out = backward.grad_out;
  arguments->student_q = describe_destination(problem, backward.student_q);
  arguments->student_k = describe_destination(problem, backward.student_k);
  arguments->scale = static_cast<float>(problem.student_scale);
  return describe_problem(&arguments->pipeline, problem, hold_keys, rows);
}

}  // namespace haste::cuda::hopper
