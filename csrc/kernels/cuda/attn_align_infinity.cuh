// That an operand of attn_align_loss was infinite must show in the loss. Products beyond float are held to finite numbers,
// as of finite operands they must be, and then an infinite logit looks like one of those. So a row whose results hint at
// a logit that was held, which takes no more than a look at them, is read once more where it lies: it is NaN if it, or a
// key that it sees, holds anything but finite numbers. Of a −∞ among a teacher's logits nothing shows: as in the
// definition, that key has no part in the row.
#pragma once

#include "arch.cuh"

namespace haste::cuda {

// q and k of one model in device memory; strides in elements.
template <typename T>
struct QueriesAndKeys {
  const T *q, *k;  // of this (batch, head)
  int64_t q_stride, k_stride;
  int dim;

  // Whether the query, and the keys before `keys`, are all finite, as far as this lane of four looks.
  __device__ bool are_finite(int query, int keys) const {
    bool finite = true;
#pragma unroll 1  // code that hardly ever runs
    for (int row = -1; row < keys; ++row) {
      const T* numbers = row < 0 ? q + query * q_stride : k + row * k_stride;
#pragma unroll 1
      for (int i = threadIdx.x % 4; i < dim; i += 4) finite &= fabsf(to_float(numbers[i])) <= 3.402823466e38f;
    }
    return finite;
  }
};

// What a row came to: the maxima, sums and x of its four lanes together. Of sums that are NaN nothing needs to be known:
// it shows already, in the loss and, by way of the sums, in the gradients.
struct RowOutcome {
  float student_maximum, teacher_maximum, student_sum, teacher_sum, x;

  // Beyond 1e15, x may hold the distance of a student's logit that was held, times a small probability; NaN is what a
  // maximum that rises beyond float leaves of it.
  __device__ bool hints_at_infinity(float largest_logit) const {
    const bool held = fmaxf(fabsf(student_maximum), fabsf(teacher_maximum)) >= largest_logit || !(fabsf(x) < 1e15f);
    return held && student_sum + teacher_sum == student_sum + teacher_sum;
  }
};

}  // namespace haste::cuda
