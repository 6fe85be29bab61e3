// How G and grad_out keep to the range of 16-bit numbers in the backward of attn_align_loss.
//
// G is formed in fp32 and rounded once, to the operand type. It may be as small as fp16's subnormals (1/tokens times
// the distance of the two maps), so in 16 bits it carries a factor 2^14, which costs nothing (it sits in 1 / l) and is
// taken back exactly at the end. |G| ≤ 1, and the weights of dk are below 2, so the largest is 2^15.
//
// grad_out g_i: dq_i is multiplied by it at the end. For dk it stands inside the sum; G takes g_i / g_ref, where g_ref
// is the power of 2 at or below the largest |g_i| of this (batch, head), an exact division, and dk takes g_ref.
#pragma once

#include "arch.cuh"

namespace haste::cuda {

// The factor that G carries.
template <typename T>
constexpr float kGradientFactor = sizeof(T) == 2 ? 16384.f : 1.f;

// g_ref of one (batch, head) and its inverse, both exact. Every warp that needs them computes them alone.
struct GradOutReference {
  float value = 1.f, inverse = 1.f;

  GradOutReference() = default;
  __device__ GradOutReference(const float* grad_out_of_head, int64_t stride, int tokens) {
    float largest = 0.f;
    const int rows = stride == 0 ? 1 : tokens;  // an expanded number
    for (int row = threadIdx.x % kWarpSize; row < rows; row += kWarpSize) {
      largest = fmaxf(largest, fabsf(grad_out_of_head[row * stride]));
    }
    const unsigned exponent = __float_as_uint(reduce_max<kWarpSize>(largest)) >> 23;
    const unsigned normal = min(max(exponent, 1u), 253u);  // so that the inverse is a normal number too
    value = __uint_as_float(normal << 23);
    inverse = __uint_as_float((254u - normal) << 23);
  }
};

}  // namespace haste::cuda
