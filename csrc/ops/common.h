// What the three operations share: from a stable-ABI tensor to what a kernel is told, and back.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <string>

#include "kernels/kernel_types.h"

namespace haste {

using torch::stable::Tensor;
using TorchType = torch::headeronly::ScalarType;

// The kernels' name of the tensor's type; refuses any but float32, float64, float16, bfloat16.
ScalarType scalar_type(const Tensor& tensor, const char* argument);

// The type of losses and log-sum-exps: float64 for float64, float32 for the rest.
TorchType row_type(const Tensor& student);

// The tensor itself where its last stride is 1, else a contiguous copy.
Tensor with_unit_last_stride(const Tensor& tensor);

void check_shape(bool good, const char* argument, const Tensor& tensor, const std::string& must_be);
void check_same_device(const Tensor& first, const Tensor& other, const char* argument);

// torch's own thread pool as the kernels see it.
ParallelFor parallel_for();

// For a CUDA tensor: makes sure that this binary can run on its device, makes the device current, and hands out
// torch's current stream. Refuses, with what is missing and the command that mends it, in a build without CUDA.
class CudaLaunch {
 public:
  explicit CudaLaunch(const Tensor& tensor);
  ~CudaLaunch();
  CudaLaunch(const CudaLaunch&) = delete;
  CudaLaunch& operator=(const CudaLaunch&) = delete;

  void* stream() const { return stream_; }

 private:
  void* stream_ = nullptr;
  void* guard_ = nullptr;
};

// Raises what a CUDA kernel's launch answered, if anything.
void check_launch(const char* error, const char* operation);

// The sentence for a CUDA tensor in a build without CUDA; empty in a build with it.
std::string missing_cuda();

}  // namespace haste
