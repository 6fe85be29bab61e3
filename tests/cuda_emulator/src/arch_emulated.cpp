// The primitives of csrc/kernels/cuda/arch.cuh on the host, by the fragment layouts of the PTX ISA.
#include <kernels/cuda/arch.cuh>

#include "warp.h"

namespace {

using namespace emulation;

// ldmatrix: kCount matrices of 8 rows of 8 16-bit elements; lane 8·i + r names row r of matrix i.
template <int kCount, bool kTransposed>
void load_matrices_of_warp(uint32_t (&registers)[kCount], const void* row) {
  struct Argument {
    uint32_t* registers;
    const void* row;
  } argument{registers, row};
  if (lane() < 8 * kCount) check_shared(row, 16);
  meet_warp(argument, [](void* const* arguments) {
    const auto element = [&](int matrix, int r, int c) {
      return static_cast<const uint16_t*>(at<Argument>(arguments, 8 * matrix + r).row)[c];
    };
    for (int lane = 0; lane < 32; ++lane) {
      for (int matrix = 0; matrix < kCount; ++matrix) {
        const int r = lane / 4, c = lane % 4 * 2;
        const uint32_t low = kTransposed ? element(matrix, c, r) : element(matrix, r, c);
        const uint32_t high = kTransposed ? element(matrix, c + 1, r) : element(matrix, r, c + 1);
        at<Argument>(arguments, lane).registers[matrix] = low | high << 16;
      }
    }
  });
}

// mma m16n8k(8·kHalves): A rows lane/4 and lane/4 + 8 in registers 2·half and 2·half + 1, B in register half.
template <typename T, int kHalves>
void multiply_add_of_warp(float (&c)[4], const uint32_t (&a)[2 * kHalves], const uint32_t (&b)[kHalves]) {
  struct Argument {
    float* c;
    const uint32_t *a, *b;
  } argument{c, a, b};
  meet_warp(argument, [](void* const* arguments) {
    float left[16][8 * kHalves], right[8 * kHalves][8];
    for (int lane = 0; lane < 32; ++lane) {
      const Argument& from = at<Argument>(arguments, lane);
      for (int half = 0; half < kHalves; ++half) {
        for (int i = 0; i < 2; ++i) {
          const int k = 8 * half + lane % 4 * 2 + i;
          left[lane / 4][k] = element_of<T>(from.a[2 * half], i);
          left[lane / 4 + 8][k] = element_of<T>(from.a[2 * half + 1], i);
          right[k][lane / 4] = element_of<T>(from.b[half], i);
        }
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      float* c = at<Argument>(arguments, lane).c;
      for (int i = 0; i < 4; ++i) {
        double sum = c[i];
        for (int k = 0; k < 8 * kHalves; ++k) {
          sum += static_cast<double>(left[lane / 4 + i / 2 * 8][k]) * right[k][lane % 4 * 2 + i % 2];
        }
        c[i] = truncated(sum);
      }
    }
  });
}

float shuffle(float value, int source_lane) {
  struct Argument {
    float value;
    int source_lane;
    float result;
  } argument{value, source_lane, 0.f};
  meet_warp(argument, [](void* const* arguments) {
    for (int lane = 0; lane < 32; ++lane) {
      auto& to = at<Argument>(arguments, lane);
      to.result = at<Argument>(arguments, to.source_lane).value;
    }
  });
  return argument.result;
}

}  // namespace

void __syncwarp(unsigned) {
  emulation::meet_warp([](void* const*) {}, nullptr);
}
float __shfl_sync(unsigned, float value, int source_lane, int) { return shuffle(value, source_lane % 32); }
float __shfl_xor_sync(unsigned, float value, int lane_mask, int) {
  return shuffle(value, emulation::lane() ^ lane_mask);
}
int __any_sync(unsigned, int predicate) {
  meet_warp(predicate, [](void* const* arguments) {
    int any = 0;
    for (int lane = 0; lane < 32; ++lane) any |= at<int>(arguments, lane) != 0;
    for (int lane = 0; lane < 32; ++lane) at<int>(arguments, lane) = any;
  });
  return predicate;
}

namespace haste::cuda {

void* dynamic_shared_memory() { return emulation::shared_memory(); }
void copy_async_16(void* shared, const void* global, bool valid) { emulation::start_copy(shared, global, 16, valid); }
void copy_async_8(void* shared, const void* global, bool valid) { emulation::start_copy(shared, global, 8, valid); }
void copy_async_4(void* shared, const void* global, bool valid) { emulation::start_copy(shared, global, 4, valid); }
void wait_for_copies() { emulation::finish_copies(); }

void load_matrices(uint32_t (&registers)[4], const void* row) { load_matrices_of_warp<4, false>(registers, row); }
void load_matrices(uint32_t (&registers)[2], const void* row) { load_matrices_of_warp<2, false>(registers, row); }
void load_matrices_transposed(uint32_t (&registers)[4], const void* row) {
  load_matrices_of_warp<4, true>(registers, row);
}
void load_matrices_transposed(uint32_t (&registers)[2], const void* row) {
  load_matrices_of_warp<2, true>(registers, row);
}

template <typename T>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  multiply_add_of_warp<T, 2>(c, a, {b0, b1});
}
template <typename T>
void multiply_add(float (&c)[4], const uint32_t (&a)[2], uint32_t b) {
  multiply_add_of_warp<T, 1>(c, a, {b});
}
template void multiply_add<__half>(float (&)[4], const uint32_t (&)[4], uint32_t, uint32_t);
template void multiply_add<__half>(float (&)[4], const uint32_t (&)[2], uint32_t);
template void multiply_add<__nv_bfloat16>(float (&)[4], const uint32_t (&)[4], uint32_t, uint32_t);
template void multiply_add<__nv_bfloat16>(float (&)[4], const uint32_t (&)[2], uint32_t);

// ex2.approx may be off by 2 ulp and flushes subnormal results: so does this, by an amount that hangs on the bits of x.
float fast_exp2(float x) {
  const float exact = std::exp2(x);
  if (exact < 1.17549435e-38f) return 0.f;
  if (x == std::nearbyint(x) || !std::isfinite(exact)) return exact;
  const int ulps = static_cast<int>((__float_as_uint(x) * 2654435761u >> 16) % 5) - 2;
  return __uint_as_float(__float_as_uint(exact) + ulps);
}

void load_16(uint4& words, const void* source, bool wanted) {
  if (wanted) words = *static_cast<const uint4*>(source);
}

void load_16_once(uint4& words, const void* source, bool wanted) { load_16(words, source, wanted); }

float clamp(float x, float limit) { return std::isnan(x) ? x : std::clamp(x, -limit, limit); }

}  // namespace haste::cuda
