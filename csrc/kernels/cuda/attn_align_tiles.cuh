// What the three kernels of attn_align_loss share: their arguments, and how tiles come into shared memory.
//
// A block of 4 warps holds 64 rows of one (batch, head), the *held* side: queries in the forward and for dq, keys for
// dk. It streams the other side past them in tiles. Four tiles lie in shared memory, held and streamed of student and
// teacher. The streamed ones need no second buffer: while the block works on one model's tile, the other's is on its way.
#pragma once

#include "../attn_align_loss.h"
#include "arch.cuh"
#include "element_type.cuh"
#include "launch.cuh"

namespace haste::cuda {

constexpr int kBlockThreads = 128;
constexpr int kHeldRows = 64;  // 16 per warp
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// Elements in 16 bytes, the unit in which tiles are copied.
template <typename T>
constexpr int kChunk = 16 / static_cast<int>(sizeof(T));

// q or k of one model in device memory; strides in elements.
template <typename T>
struct Operand {
  const T* data;
  int64_t stride_batch, stride_head, stride_token;
  bool chunked;  // every row is made of whole, 16-byte-aligned chunks
};

template <typename T>
struct Model {
  Operand<T> held, streamed;
  int dim, padded_dim;       // the head dim, and the next multiple of 8
  int chunks;                // in a padded row
  int shared_stride;         // between rows of a tile: an odd number of chunks, so that 8 rows lie in different banks
  int row_step, chunk_step;  // what kBlockThreads chunks further on means
  float scale_log2;          // logit scale · log2(e): the kernels take powers of 2
};

template <typename T>
struct AlignArguments {
  int heads, tokens, row_blocks;
  int causal;  // tokens in a block of the mask; without a mask all of them, so that every token is in the first block
  Model<T> student, teacher;

  // Keys from here on are hidden from the query; queries before there do not see the key.
  __device__ int visible_keys(int query) const { return min(query - query % causal + causal, tokens); }
  __device__ int first_query(int key) const { return key - key % causal; }

  template <int kStreamedRows>
  int64_t tile_bytes() const {
    return static_cast<int64_t>(sizeof(T)) * (kHeldRows + kStreamedRows) *
           (student.shared_stride + teacher.shared_stride);
  }
};

// Which 64 rows of which (batch, head) this block holds.
struct BlockPlace {
  int batch, head, first_row;
  int64_t first_of_head;  // index of this (batch, head)'s first row in the contiguous row results

  template <typename T>
  __device__ explicit BlockPlace(const AlignArguments<T>& arguments) {
    const int batch_head = blockIdx.x / arguments.row_blocks;
    batch = batch_head / arguments.heads;
    head = batch_head % arguments.heads;
    first_row = blockIdx.x % arguments.row_blocks * kHeldRows;
    first_of_head = static_cast<int64_t>(batch_head) * arguments.tokens;
  }
};

// The four tiles in shared memory, and the bytes behind them.
template <typename T, int kStreamedRows>
struct Tiles {
  T *held_student, *held_teacher, *streamed_student, *streamed_teacher;
  void* rest;

  __device__ explicit Tiles(const AlignArguments<T>& arguments) {
    held_student = static_cast<T*>(dynamic_shared_memory());
    held_teacher = held_student + kHeldRows * arguments.student.shared_stride;
    streamed_student = held_teacher + kHeldRows * arguments.teacher.shared_stride;
    streamed_teacher = streamed_student + kStreamedRows * arguments.student.shared_stride;
    rest = streamed_teacher + kStreamedRows * arguments.teacher.shared_stride;
  }
};

// Starts the copy of rows [first, first + kRows) into a tile. Rows past the last token and columns past the head dim
// become zeros. Whole aligned chunks travel asynchronously, anything else element by element.
template <int kRows, typename T>
__device__ void copy_tile(T* tile, const Model<T>& model, const Operand<T>& operand, const BlockPlace& place, int first,
                          int tokens) {
  const T* rows = operand.data + place.batch * operand.stride_batch + place.head * operand.stride_head;
  int row = threadIdx.x / model.chunks;
  int chunk = threadIdx.x % model.chunks;
#pragma unroll 1  // the copies are asynchronous: unrolling would only cost registers
  while (row < kRows) {
    T* target = tile + row * model.shared_stride + chunk * kChunk<T>;
    const int column = chunk * kChunk<T>;
    const bool valid = first + row < tokens && column < model.dim;
    const T* source = valid ? rows + (first + row) * operand.stride_token + column : rows;
    if (operand.chunked) {
      copy_async_16(target, source, valid);
    } else {
#pragma unroll
      for (int i = 0; i < kChunk<T>; ++i) {
        target[i] = valid && column + i < model.dim ? source[i] : from_float<T>(0.f);
      }
    }
    row += model.row_step;
    chunk += model.chunk_step;
    if (chunk >= model.chunks) {
      chunk -= model.chunks;
      ++row;
    }
  }
}

// Host side: the arguments for a problem whose held side is the queries (forward, dq) or the keys (dk).

template <typename T>
Operand<T> describe_operand(const AttnAlignProblem& problem, const AttnOperand& operand) {
  constexpr int64_t size = sizeof(T);
  const bool chunked = aligned_16(operand.data) && operand.dim * size % 16 == 0 &&
                       stride_aligned_16(problem.batch, operand.stride_batch, size) &&
                       stride_aligned_16(problem.heads, operand.stride_head, size) &&
                       stride_aligned_16(problem.tokens, operand.stride_token, size);
  return {static_cast<const T*>(operand.data), operand.stride_batch, operand.stride_head, operand.stride_token,
          chunked};
}

template <typename T>
Model<T> describe_model(const AttnAlignProblem& problem, const AttnOperand& held, const AttnOperand& streamed,
                        double scale) {
  Model<T> model{};
  model.held = describe_operand<T>(problem, held);
  model.streamed = describe_operand<T>(problem, streamed);
  model.dim = static_cast<int>(held.dim);
  model.padded_dim = static_cast<int>(ceil_div(held.dim, 8) * 8);
  model.chunks = model.padded_dim / kChunk<T>;
  model.shared_stride = (model.chunks | 1) * kChunk<T>;
  model.row_step = kBlockThreads / model.chunks;
  model.chunk_step = kBlockThreads % model.chunks;
  model.scale_log2 = static_cast<float>(scale * 1.4426950408889634);
  return model;
}

template <typename T>
AlignArguments<T> describe(const AttnAlignProblem& problem, bool hold_keys) {
  AlignArguments<T> arguments{};
  arguments.heads = static_cast<int>(problem.heads);
  arguments.tokens = static_cast<int>(problem.tokens);
  arguments.row_blocks = static_cast<int>(ceil_div(problem.tokens, kHeldRows));
  const bool masked = problem.causal > 0 && problem.causal < problem.tokens;
  arguments.causal = static_cast<int>(masked ? problem.causal : problem.tokens);
  const auto model = [&](const AttnOperand& q, const AttnOperand& k, double scale) {
    return hold_keys ? describe_model<T>(problem, k, q, scale) : describe_model<T>(problem, q, k, scale);
  };
  arguments.student = model(problem.student_q, problem.student_k, problem.student_scale);
  arguments.teacher = model(problem.teacher_q, problem.teacher_k, problem.teacher_scale);
  return arguments;
}

// One block per 64 rows of every (batch, head), all on the x dimension of the grid.
inline int64_t count_blocks(const AttnAlignProblem& problem) {
  return problem.batch * problem.heads * ceil_div(problem.tokens, kHeldRows);
}

// nullptr, or why the kernels cannot take this problem. The operation checks more, and names its arguments.
inline const char* refusal(const AttnAlignProblem& problem) {
  const ScalarType type = problem.student_q.type;
  if (type == ScalarType::Float64) return "attn_align_loss on CUDA takes float32, float16 and bfloat16, not float64";
  for (const AttnOperand* operand : {&problem.student_q, &problem.student_k, &problem.teacher_q, &problem.teacher_k}) {
    if (operand->type != type) return "attn_align_loss on CUDA needs student and teacher of one type";
    if (operand->dim < 1 || operand->dim > attn_align_loss_max_dim) {
      return "attn_align_loss on CUDA needs head dims of 1 to 128";
    }
  }
  if (!fits_int(problem.tokens) || !fits_int(count_blocks(problem))) {
    return "attn_align_loss on CUDA takes fewer than 2^31 tokens and blocks of 64 rows";
  }
  return nullptr;
}

}  // namespace haste::cuda
