// How the copy engine is told where an operand lies; see tensor_map.h.
#include "tensor_map.h"

#include <cuda_runtime.h>
#include "launch.cuh"

namespace haste::cuda {
namespace {

constexpr int kDimensions = 4;  // dim, token, head, batch
constexpr int64_t kElementBytes = 2;
constexpr int64_t kStrideAlignment = 16;
constexpr int64_t kStrideLimit = int64_t{1} << 40;

struct Extents {
  int64_t size[kDimensions];
  int64_t row_bytes;
  int64_t stride_bytes[kDimensions - 1];  // of token, head and batch; any of them may be the smallest
};

// The stride of a dimension of one element means nothing, but must be a valid one.
Extents extents_of(const AttnOperand& operand, int64_t batch, int64_t heads, int64_t tokens) {
  const int64_t row_bytes = operand.dim * kElementBytes;
  const auto stride = [&](int64_t size, int64_t elements) {
    return size == 1 ? ceil_div(row_bytes, kStrideAlignment) * kStrideAlignment : elements * kElementBytes;
  };
  return {
      {operand.dim, tokens, heads, batch},
      row_bytes,
      {stride(tokens, operand.stride_token), stride(heads, operand.stride_head), stride(batch, operand.stride_batch)}};
}

using Encode = decltype(&cuTensorMapEncodeTiled);

// From the driver in use, so that the library loads without one; null if the driver does not know it.
Encode find_encode() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult result;
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
  if (error != cudaSuccess) cudaGetLastError();  // this one is dealt with
  if (error != cudaSuccess || result != cudaDriverEntryPointSuccess) return nullptr;
  return reinterpret_cast<Encode>(function);
}

}  // namespace

bool can_map(const AttnOperand& operand, int64_t batch, int64_t heads, int64_t tokens) {
  if (operand.type != ScalarType::Float16 && operand.type != ScalarType::BFloat16) return false;
  if (!aligned_16(operand.data)) return false;
  const Extents extents = extents_of(operand, batch, heads, tokens);
  for (const int64_t size : extents.size) {
    if (size < 1 || size > INT32_MAX) return false;
  }
  for (const int64_t stride : extents.stride_bytes) {
    if (stride < extents.row_bytes || stride >= kStrideLimit || stride % kStrideAlignment != 0) return false;
  }
  return true;
}

const char* describe(TensorMap* map, const AttnOperand& operand, int64_t batch, int64_t heads, int64_t tokens,
                     int rows) {
  static const Encode encode = find_encode();
  if (encode == nullptr) return "the CUDA driver has no cuTensorMapEncodeTiled; it must be one for CUDA 12.0 or newer";
  const Extents extents = extents_of(operand, batch, heads, tokens);
  cuuint64_t sizes[kDimensions], strides[kDimensions - 1];
  for (int i = 0; i < kDimensions; ++i) sizes[i] = static_cast<cuuint64_t>(extents.size[i]);
  for (int i = 0; i < kDimensions - 1; ++i) strides[i] = static_cast<cuuint64_t>(extents.stride_bytes[i]);
  const cuuint32_t box[kDimensions] = {kPanelColumns, static_cast<cuuint32_t>(rows), 1, 1};  // may exceed the tensor
  const cuuint32_t steps[kDimensions] = {1, 1, 1, 1};
  const auto type =
      operand.type == ScalarType::Float16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const CUresult result = encode(map, type, kDimensions, const_cast<void*>(operand.data), sizes, strides, box, steps,
                                 CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? nullptr : "the CUDA driver refused to describe an operand (cuTensorMapEncodeTiled)";
}

}  // namespace haste::cuda
