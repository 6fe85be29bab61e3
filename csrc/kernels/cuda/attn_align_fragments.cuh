// The two products of attn_align_loss on the tiles of one warp, by element type. Both types of arithmetic share the
// accumulator layout of mma (arch.cuh): lane owns rows lane/4 and lane/4 + 8, columns 2·(lane%4) + {0, 1} of every
// 8-column tile. The rest of the kernels does not know which arithmetic it runs on.
//   logits:      c = A·Bᵀ, A 16 × dim and B (8·kTiles) × dim, both row-major in shared memory
//   accumulate:  c += G·B, G 16 × (8·kTiles) in accumulator layout, B (8·kTiles) × dim row-major in shared memory
// dim is a multiple of 8 in both: the tiles hold zeros beyond the head dim.
#pragma once

#include "arch.cuh"

namespace haste::cuda {

// Tensor cores: T is __half or __nv_bfloat16.
template <typename T>
struct Fragments {
  template <int kTiles>
  static __device__ void logits(float (&c)[kTiles][4], const T* a, const T* b, int stride, int dim) {
    static_assert(kTiles % 4 == 0, "one load fetches four 8 × 8 matrices");
    const int lane = threadIdx.x % kWarpSize;
    const T* a_row = a + (lane % 16) * stride;
    const T* b_row = b + (lane / 16 * 8 + lane % 8) * stride + lane / 8 % 2 * 8;
#pragma unroll
    for (auto& tile : c) tile[0] = tile[1] = tile[2] = tile[3] = 0.f;

    int k = 0;
#pragma unroll 2  // further would cost a block per multiprocessor in registers
    for (; k + 16 <= dim; k += 16) {
      uint32_t a_fragment[4];
      load_matrices(a_fragment, a_row + k + lane / 16 * 8);
#pragma unroll
      for (int pair = 0; pair < kTiles / 2; ++pair) {
        uint32_t b_fragment[4];
        load_matrices(b_fragment, b_row + pair * 16 * stride + k);
        multiply_add<T>(c[2 * pair], a_fragment, b_fragment[0], b_fragment[1]);
        multiply_add<T>(c[2 * pair + 1], a_fragment, b_fragment[2], b_fragment[3]);
      }
    }
    if (k < dim) {  // 8 columns are left, as in 72 = 4·16 + 8
      uint32_t a_fragment[2];
      load_matrices(a_fragment, a_row + k);
#pragma unroll
      for (int quad = 0; quad < kTiles / 4; ++quad) {
        uint32_t b_fragment[4];
        load_matrices(b_fragment, b + (quad * 32 + lane) * stride + k);
#pragma unroll
        for (int i = 0; i < 4; ++i) multiply_add<T>(c[4 * quad + i], a_fragment, b_fragment[i]);
      }
    }
  }

  template <int kTiles, int kDimTiles>
  static __device__ void accumulate(float (&c)[kDimTiles][4], const float (&g)[kTiles][4], const T* b, int stride,
                                    int dim) {
    const int lane = threadIdx.x % kWarpSize;
    const T* b_row = b + (lane % 16) * stride;
#pragma unroll
    for (int pair = 0; pair < kTiles / 2; ++pair) {
      // The accumulators of two neighbouring tiles are an A fragment as they stand.
      const float (&left)[4] = g[2 * pair];
      const float (&right)[4] = g[2 * pair + 1];
      const uint32_t a_fragment[4] = {pack<T>(left[0], left[1]), pack<T>(left[2], left[3]), pack<T>(right[0], right[1]),
                                      pack<T>(right[2], right[3])};
#pragma unroll
      for (int tile = 0; tile < kDimTiles; tile += 2) {
        const T* source = b_row + pair * 16 * stride + tile * 8;
        if (tile + 1 < kDimTiles && (tile + 1) * 8 < dim) {
          uint32_t b_fragment[4];
          load_matrices_transposed(b_fragment, source + lane / 16 * 8);
          multiply_add<T>(c[tile], a_fragment, b_fragment[0], b_fragment[1]);
          multiply_add<T>(c[tile + 1], a_fragment, b_fragment[2], b_fragment[3]);
        } else if (tile * 8 < dim) {
          uint32_t b_fragment[2];
          load_matrices_transposed(b_fragment, source);
          multiply_add<T>(c[tile], a_fragment, b_fragment[0], b_fragment[1]);
        }
      }
    }
  }
};

// Plain fp32 fused multiply-adds, no TF32.
template <>
struct Fragments<float> {
  template <int kTiles>
  static __device__ void logits(float (&c)[kTiles][4], const float* a, const float* b, int stride, int dim) {
    const int lane = threadIdx.x % kWarpSize;
    const float* a_row = a + lane / 4 * stride;
    const float* b_row = b + lane % 4 * 2 * stride;
#pragma unroll
    for (auto& tile : c) tile[0] = tile[1] = tile[2] = tile[3] = 0.f;

    for (int k = 0; k < dim; k += 4) {
      const float4 upper = *reinterpret_cast<const float4*>(a_row + k);
      const float4 lower = *reinterpret_cast<const float4*>(a_row + 8 * stride + k);
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int column = 0; column < 2; ++column) {
          const float4 other = *reinterpret_cast<const float4*>(b_row + (tile * 8 + column) * stride + k);
          c[tile][column] = dot(c[tile][column], upper, other);
          c[tile][2 + column] = dot(c[tile][2 + column], lower, other);
        }
      }
    }
  }

  template <int kTiles, int kDimTiles>
  static __device__ void accumulate(float (&c)[kDimTiles][4], const float (&g)[kTiles][4], const float* b, int stride,
                                    int dim) {
    const int lane = threadIdx.x % kWarpSize;
    const int first_of_row = lane / 4 * 4;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int column = 0; column < 8; ++column) {  // the lane that owns this column of G tells the others
        const float upper = __shfl_sync(kFullWarp, g[tile][column % 2], first_of_row + column / 2);
        const float lower = __shfl_sync(kFullWarp, g[tile][2 + column % 2], first_of_row + column / 2);
        const float* b_row = b + (tile * 8 + column) * stride + lane % 4 * 2;
#pragma unroll
        for (int dim_tile = 0; dim_tile < kDimTiles; ++dim_tile) {
          if (dim_tile * 8 >= dim) break;
          const float2 other = *reinterpret_cast<const float2*>(b_row + dim_tile * 8);
          c[dim_tile][0] = fmaf(upper, other.x, c[dim_tile][0]);
          c[dim_tile][1] = fmaf(upper, other.y, c[dim_tile][1]);
          c[dim_tile][2] = fmaf(lower, other.x, c[dim_tile][2]);
          c[dim_tile][3] = fmaf(lower, other.y, c[dim_tile][3]);
        }
      }
    }
  }

 private:
  static __device__ float dot(float sum, const float4& a, const float4& b) {
    return fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.y, b.y, fmaf(a.x, b.x, sum))));
  }
};

}  // namespace haste::cuda
