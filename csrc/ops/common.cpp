#include "ops/common.h"

#include <dlfcn.h>

#include <sstream>

#ifdef HASTE_WITH_CUDA
#include "kernels/cuda/device.h"
#endif

namespace haste {

ScalarType scalar_type(const Tensor& tensor, const char* argument) {
  switch (tensor.scalar_type()) {
    case TorchType::Float: return ScalarType::Float32;
    case TorchType::Double:
      STD_TORCH_CHECK(tensor.is_cpu(), argument, " must be float32, float16 or bfloat16 on CUDA, got float64");
      return ScalarType::Float64;
    case TorchType::Half: return ScalarType::Float16;
    case TorchType::BFloat16: return ScalarType::BFloat16;
    default:
      STD_TORCH_CHECK(false, argument, " must be float32, float64, float16 or bfloat16, got ",
                      torch::headeronly::toString(tensor.scalar_type()));
  }
}

TorchType row_type(const Tensor& student) {
  return student.scalar_type() == TorchType::Double ? TorchType::Double : TorchType::Float;
}

Tensor with_unit_last_stride(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  if (tensor.size(last) <= 1 || tensor.stride(last) == 1) return tensor;
  return torch::stable::contiguous(tensor);
}

void check_shape(bool good, const char* argument, const Tensor& tensor, const std::string& must_be) {
  if (good) return;
  std::ostringstream shape;
  for (int64_t i = 0; i < tensor.dim(); ++i) shape << (i ? ", " : "") << tensor.size(i);
  STD_TORCH_CHECK(false, argument, " must be ", must_be, ", got shape (", shape.str(), ")");
}

void check_same_device(const Tensor& first, const Tensor& other, const char* argument) {
  STD_TORCH_CHECK(first.is_cuda() == other.is_cuda() && first.is_cpu() == other.is_cpu() &&
                      (first.is_cpu() || first.get_device() == other.get_device()),
                  argument, " must be on the device of the first argument, got another");
}

ParallelFor parallel_for() {
  return [](int64_t count, const RangeBody& body) { torch::stable::parallel_for(0, count, 1, body); };
}

std::string missing_cuda() {
#ifdef HASTE_WITH_CUDA
  return "";
#else
  return "a CUDA tensor needs the CUDA kernels and this haste_ext was built without them (no nvcc was found): put "
         "nvcc on PATH (or set CUDACXX) and run "
         "`pip install --no-build-isolation --force-reinstall --no-deps .` in the source folder";
#endif
}

#ifdef HASTE_WITH_CUDA
namespace {

// Not in the stable ABI before torch 2.13, and absent from a CPU build of torch: asked of the libtorch_cuda that
// the process has loaded.
void* current_stream(int device) {
  using GetStream = int32_t (*)(int32_t, void**);
  static const GetStream get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return reinterpret_cast<GetStream>(library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr);
  }();
  STD_TORCH_CHECK(get, "a CUDA tensor was given but libtorch_cuda.so is not loaded: install a CUDA build of torch");
  void* stream = nullptr;
  STD_TORCH_CHECK(get(device, &stream) == 0, "torch could not name the current stream of CUDA device ", device);
  return stream;
}

}  // namespace
#endif

CudaLaunch::CudaLaunch(const Tensor& tensor) {
#ifdef HASTE_WITH_CUDA
  const int device = tensor.get_device();
  const char* problem = cuda::device_problem(device);
  STD_TORCH_CHECK(problem == nullptr, problem ? problem : "");
  stream_ = current_stream(device);
  guard_ = new cuda::DeviceGuard(device);
#else
  (void)tensor;
  STD_TORCH_CHECK(false, missing_cuda());
#endif
}

CudaLaunch::~CudaLaunch() {
#ifdef HASTE_WITH_CUDA
  delete static_cast<cuda::DeviceGuard*>(guard_);
#endif
}

void check_launch(const char* error, const char* operation) {
  STD_TORCH_CHECK(error == nullptr, operation, ": the CUDA launch failed: ", error ? error : "");
}

}  // namespace haste
