// attn_align_loss, backward: dq and dk, each by its own kernel launch, deterministic and without atomics.
//
// Both are one kernel template. It holds 64 rows (queries for dq, keys for dk), streams the other side, forms
//   G = 2^(s − m_s) / l_s − 2^(t − m_t) / l_t        s, t and their maxima m in powers of 2
// in registers, and multiplies it onto the streamed student tile: dq_i += G_ij k_j, or dk_j += Gᵀ_ji q_i. For dk the
// products are computed transposed from the start, so Gᵀ too is an A operand where it stands.
// Its range and grad_out: attn_align_grad_out.cuh.
//
// Compiled once per HASTE_ELEMENT: float32 float16 bfloat16
#include "attn_align_fragments.cuh"
#include "attn_align_grad_out.cuh"
#include "attn_align_tiles.cuh"

namespace haste::cuda {

template <typename T>
struct GradientArguments {
  const float2 *student_statistics, *teacher_statistics;  // (batch, heads, tokens) contiguous: {m, 1 / l}
  RowGradient grad_out;
  AttnGradient destination;
  bool destination_chunked;  // its rows may be written in 16-byte chunks
  float scale;               // the student's logit scale
};

// Streamed rows at a time, in tiles of 8: fewer in fp32, so that head dim 128 fits the 99 KB of the smallest devices.
template <typename T, int kDimTiles>
constexpr int kStreamedTiles = sizeof(T) == 2   ? 8
                               : kDimTiles > 12 ? 2
                                                : 4;

// What G needs to know of one query. The factors are weight / l: the weight is what G carries, and for dk g_i / g_ref.
struct Query {
  float student_maximum, student_factor, teacher_maximum, teacher_factor;

  __device__ Query() : student_maximum(0.f), student_factor(0.f), teacher_maximum(0.f), teacher_factor(0.f) {}
  __device__ Query(float2 student, float2 teacher, float weight)
      : student_maximum(student.x),
        student_factor(student.y * weight),
        teacher_maximum(teacher.x),
        teacher_factor(teacher.y * weight) {}
};

// 2^(logit − maximum). In fp32 the logit is rounded as the forward rounded it, so that the largest gives exactly 1. What
// overflowed there was held to a finite maximum and is above it here.
template <typename T>
__device__ float power(float dot, float scale_log2, float maximum) {
  const float distance = sizeof(T) == 4 ? __fmul_rn(dot, scale_log2) - maximum : fmaf(dot, scale_log2, -maximum);
  return fast_exp2(fminf(distance, 0.f));
}

template <typename T>
__device__ float gradient_element(float student_dot, float teacher_dot, float student_scale, float teacher_scale,
                                  const Query& query) {
  return query.student_factor * power<T>(student_dot, student_scale, query.student_maximum) -
         query.teacher_factor * power<T>(teacher_dot, teacher_scale, query.teacher_maximum);
}

// Makes G 0 where the query does not see the key. That a key past the last one is zeros does not do: the G of it is not,
// and infinity times zero would be NaN. Most tiles have nothing to hide.
template <bool kHoldKeys, typename T, int kTiles>
__device__ void hide_elements(float (&g)[kTiles][4], const AlignArguments<T>& arguments, int first, int first_row,
                              int last_row, int first_of_warp) {
  const bool all_seen =
      kHoldKeys ? first >= arguments.first_query(last_row) : first + 8 * kTiles <= arguments.visible_keys(first_row);
  if (all_seen) return;
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = first_of_warp + lane / 4 + 8 * half;
    const int bound = (kHoldKeys ? arguments.first_query(row) : arguments.visible_keys(row)) - first;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int column = 0; column < 2; ++column) {
        const int streamed = tile * 8 + lane % 4 * 2 + column;
        if (kHoldKeys ? streamed < bound : streamed >= bound) g[tile][2 * half + column] = 0.f;
      }
    }
  }
}

// The row statistics of the streamed queries (dk), which travel with the student's tile.
template <typename T, int kRows>
struct QueryStatistics {
  float2 *student, *teacher;
  float* grad_out;

  __device__ explicit QueryStatistics(void* shared)
      : student(static_cast<float2*>(shared)),
        teacher(student + kRows),
        grad_out(reinterpret_cast<float*>(teacher + kRows)) {}

  // Zeros past the last query: with factors of 0, its G is 0.
  __device__ void copy(const GradientArguments<T>& gradient, const float* grad_out_of_head, int64_t first_of_head,
                       int first, int tokens) {
    const int row = threadIdx.x;
    if (row >= kRows) return;
    const bool valid = first + row < tokens;
    const int64_t source = valid ? first + row : 0;
    copy_async_8(student + row, gradient.student_statistics + first_of_head + source, valid);
    copy_async_8(teacher + row, gradient.teacher_statistics + first_of_head + source, valid);
    copy_async_4(grad_out + row, grad_out_of_head + source * gradient.grad_out.stride_token, valid);
  }

  __device__ Query query(int row, float inverse_reference) const {
    return {student[row], teacher[row], grad_out[row] * inverse_reference * kGradientFactor<T>};
  }
};

// Rounds a warp's 16 rows to T, lays them into its own rows of a tile, which nobody needs any more, and writes them out.
template <typename T, int kDimTiles>
__device__ void store_rows(const float (&rows)[kDimTiles][4], const float (&factors)[2], T* tile, const Model<T>& model,
                           const AttnGradient& destination, bool chunked, const BlockPlace& place, int first,
                           int tokens) {
  const int lane = threadIdx.x % kWarpSize;
  __syncwarp();
#pragma unroll
  for (int dim_tile = 0; dim_tile < kDimTiles; ++dim_tile) {
    if (dim_tile * 8 >= model.dim) break;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      T* row = tile + (lane / 4 + i / 2 * 8) * model.shared_stride;
      row[dim_tile * 8 + lane % 4 * 2 + i % 2] = from_float<T>(rows[dim_tile][i] * factors[i / 2]);
    }
  }
  __syncwarp();
  T* head =
      static_cast<T*>(destination.data) + place.batch * destination.stride_batch + place.head * destination.stride_head;
  const int columns = chunked ? model.dim / kChunk<T> : model.dim;  // of chunks, or of elements
  for (int i = lane; i < 16 * columns; i += kWarpSize) {
    const int row = i / columns, column = i % columns;
    if (first + row >= tokens) break;
    T* target = head + (first + row) * destination.stride_token;
    const T* source = tile + row * model.shared_stride;
    if (chunked) {
      reinterpret_cast<uint4*>(target)[column] = reinterpret_cast<const uint4*>(source)[column];
    } else {
      target[column] = source[column];
    }
  }
}

// Blocks on a multiprocessor that the registers must leave room for; 0 leaves it to the compiler. Left to it, the widest
// kernel in fp32 spills on sm_86 and sm_89 for the sake of blocks that shared memory has no room for, and the narrowest
// for a fifth.
template <typename T, int kDimTiles>
constexpr int kBlocksWanted = sizeof(T) != 4   ? 0
                              : kDimTiles > 12 ? 1
                              : kDimTiles <= 4 ? 4
                                               : 0;

template <typename T, int kDimTiles, bool kHoldKeys>
__global__ void __launch_bounds__(kBlockThreads, kBlocksWanted<T, kDimTiles>)
    gradient_kernel(AlignArguments<T> arguments, GradientArguments<T> gradient) {
  constexpr int kTiles = kStreamedTiles<T, kDimTiles>, kStreamed = 8 * kTiles;
  const Model<T>&student = arguments.student, &teacher = arguments.teacher;
  const int tokens = arguments.tokens, warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const BlockPlace place(arguments);
  const Tiles<T, kStreamed> tiles(arguments);
  QueryStatistics<T, kStreamed> statistics(tiles.rest);
  T* held_student = tiles.held_student + warp * 16 * student.shared_stride;
  const T* held_teacher = tiles.held_teacher + warp * 16 * teacher.shared_stride;
  const int first_of_warp = place.first_row + warp * 16;
  const float* grad_out = static_cast<const float*>(gradient.grad_out.data) +
                          place.batch * gradient.grad_out.stride_batch + place.head * gradient.grad_out.stride_head;

  Query held_queries[2];
  float factors[2] = {};  // of the finished rows
  float inverse_reference = 0.f;
  if constexpr (kHoldKeys) {
    const GradOutReference reference(grad_out, gradient.grad_out.stride_token, tokens);
    inverse_reference = reference.inverse;
    factors[0] = factors[1] = reference.value / kGradientFactor<T> * gradient.scale;
  } else {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_of_warp + lane / 4 + 8 * half;
      if (row >= tokens) continue;
      held_queries[half] = {gradient.student_statistics[place.first_of_head + row],
                            gradient.teacher_statistics[place.first_of_head + row], kGradientFactor<T>};
      factors[half] = grad_out[row * gradient.grad_out.stride_token] / kGradientFactor<T> * gradient.scale;
    }
  }

  // Under a causal mask a row meets the other side up to some key (dq), or from some query on (dk); so does the block.
  const int last_row = min(place.first_row + kHeldRows, tokens) - 1;
  const int begin = kHoldKeys ? arguments.first_query(place.first_row) / kStreamed * kStreamed : 0;
  const int end = kHoldKeys ? tokens : arguments.visible_keys(last_row);

  float sum[kDimTiles][4] = {};
  copy_tile<kHeldRows>(tiles.held_student, student, student.held, place, place.first_row, tokens);
  copy_tile<kHeldRows>(tiles.held_teacher, teacher, teacher.held, place, place.first_row, tokens);
  copy_tile<kStreamed>(tiles.streamed_teacher, teacher, teacher.streamed, place, begin, tokens);
  for (int first = begin; first < end; first += kStreamed) {
    wait_for_copies();
    __syncthreads();  // the teacher's tile is here, and nobody reads the student's or the statistics any more
    copy_tile<kStreamed>(tiles.streamed_student, student, student.streamed, place, first, tokens);
    if constexpr (kHoldKeys) statistics.copy(gradient, grad_out, place.first_of_head, first, tokens);
    float t[kTiles][4];
    Fragments<T>::logits(t, held_teacher, tiles.streamed_teacher, teacher.shared_stride, teacher.padded_dim);

    wait_for_copies();
    __syncthreads();  // the student's tile is here, and nobody reads the teacher's any more
    if (first + kStreamed < end) {
      copy_tile<kStreamed>(tiles.streamed_teacher, teacher, teacher.streamed, place, first + kStreamed, tokens);
    }
    float g[kTiles][4];
    Fragments<T>::logits(g, held_student, tiles.streamed_student, student.shared_stride, student.padded_dim);
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int column = 0; column < 2; ++column) {
        const int streamed = tile * 8 + lane % 4 * 2 + column;
        Query query;
        if constexpr (kHoldKeys) query = statistics.query(streamed, inverse_reference);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if constexpr (!kHoldKeys) query = held_queries[half];
          float& element = g[tile][2 * half + column];
          element =
              gradient_element<T>(element, t[tile][2 * half + column], student.scale_log2, teacher.scale_log2, query);
        }
      }
    }
    hide_elements<kHoldKeys>(g, arguments, first, place.first_row, last_row, first_of_warp);
    Fragments<T>::accumulate(sum, g, tiles.streamed_student, student.shared_stride, student.padded_dim);
  }
  store_rows(sum, factors, held_student, student, gradient.destination, gradient.destination_chunked, place,
             first_of_warp, tokens);
}

template <typename T, int kDimTiles, bool kHoldKeys>
const char* launch_gradient_kernel(const AlignArguments<T>& arguments, const GradientArguments<T>& gradient,
                                   int64_t blocks, void* stream) {
  constexpr int kStreamed = 8 * kStreamedTiles<T, kDimTiles>;
  const int64_t shared_bytes =
      arguments.template tile_bytes<kStreamed>() + (kHoldKeys ? 5 * kStreamed * sizeof(float) : 0);
  return launch(gradient_kernel<T, kDimTiles, kHoldKeys>, dim3(static_cast<unsigned>(blocks)), kBlockThreads,
                shared_bytes, stream, arguments, gradient);
}

template <typename T, bool kHoldKeys>
const char* launch_gradient(const AttnAlignProblem& problem, const AttnAlignBackward& backward, void* stream) {
  const AttnGradient& destination = kHoldKeys ? backward.student_k : backward.student_q;
  if (destination.data == nullptr) return nullptr;
  const auto arguments = describe<T>(problem, kHoldKeys);
  const bool chunked =
      describe_operand<T>(problem, {destination.data, problem.student_q.type, problem.student_q.dim,
                                    destination.stride_batch, destination.stride_head, destination.stride_token})
          .chunked;
  const GradientArguments<T> gradient{static_cast<const float2*>(backward.student_softmax),
                                      static_cast<const float2*>(backward.teacher_softmax),
                                      backward.grad_out,
                                      destination,
                                      chunked,
                                      static_cast<float>(problem.student_scale)};
  const auto run = [&](auto dim_tiles) {
    return launch_gradient_kernel<T, decltype(dim_tiles)::value, kHoldKeys>(arguments, gradient, count_blocks(problem),
                                                                            stream);
  };
  const int dim = arguments.student.dim;
  if (dim <= 32) return run(std::integral_constant<int, 4>{});
  if (dim <= 64) return run(std::integral_constant<int, 8>{});
  if (dim <= 72) return run(std::integral_constant<int, 9>{});
  if (dim <= 96) return run(std::integral_constant<int, 12>{});
  return run(std::integral_constant<int, 16>{});
}

// attn_align_loss_backward.cu calls it.
template <typename T>
const char* launch_gradients(const AttnAlignProblem& problem, const AttnAlignBackward& backward, void* stream) {
  if (const char* error = launch_gradient<T, false>(problem, backward, stream)) return error;
  return launch_gradient<T, true>(problem, backward, stream);
}
template const char* launch_gradients<elements::HASTE_ELEMENT>(const AttnAlignProblem&, const AttnAlignBackward&,
                                                               void*);

}  // namespace haste::cuda
