// What the CUDA half knows about itself and the devices; see device.h.
#include "device.h"

#include <cuda_runtime.h>

#include <map>
#include <mutex>

namespace haste::cuda {
namespace {

// Compiled for the same targets as every kernel: what holds for it holds for them.
__global__ void probe_kernel() {}

std::string joined_targets() {
  std::string joined;
  for (const std::string& target : compiled_targets()) joined += (joined.empty() ? "" : ", ") + target;
  return joined;
}

std::string rebuild_command(const std::string& capability) {
  return "TORCH_CUDA_ARCH_LIST=\"" + capability + "\" pip install --no-build-isolation --force-reinstall --no-deps .";
}

// "" if the kernels can run on the device, else why not.
std::string find_problem(int device) {
  const DeviceGuard guard(device);
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, probe_kernel);
  if (error == cudaSuccess) return "";
  cudaGetLastError();  // this one is dealt with

  int major = 0, minor = 0;
  cudaDeviceProp properties{};
  if (error == cudaErrorInsufficientDriver ||
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) ||
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) ||
      cudaGetDeviceProperties(&properties, device)) {
    cudaGetLastError();
    return std::string("haste_ext was built with CUDA " HASTE_CUDA_TOOLKIT " and cannot use CUDA device ") +
           std::to_string(device) + ": " + cudaGetErrorString(error);
  }
  const std::string capability = std::to_string(major) + "." + std::to_string(minor);
  const std::string who = std::string(properties.name) + " (CUDA device " + std::to_string(device) +
                          ") has compute capability " + capability;
  if (major < 8) return who + "; the kernels of haste_ext need 8.0 or newer";
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction ||
      error == cudaErrorUnsupportedPtxVersion || error == cudaErrorInvalidPtx) {
    return who + ", and this build of haste_ext holds machine code for " + joined_targets() +
           "; in its source folder run: " + rebuild_command(capability);
  }
  return who + ", and a kernel of haste_ext cannot be loaded on it: " + cudaGetErrorString(error);
}

}  // namespace

std::vector<std::string> compiled_targets() {
  std::vector<std::string> targets(1);
  for (const char c : std::string(HASTE_CUDA_TARGETS)) {
    if (c == ',') {
      targets.emplace_back();
    } else {
      targets.back() += c;
    }
  }
  return targets;
}

const char* device_problem(int device) {
  static std::mutex mutex;
  static std::map<int, std::string> problems;  // nodes stay where they are, so their text may be handed out
  const std::lock_guard<std::mutex> lock(mutex);
  auto found = problems.find(device);
  if (found == problems.end()) found = problems.emplace(device, find_problem(device)).first;
  return found->second.empty() ? nullptr : found->second.c_str();
}

DeviceGuard::DeviceGuard(int device) : previous_(device) {
  cudaGetDevice(&previous_);
  if (previous_ != device) cudaSetDevice(device);
}

DeviceGuard::~DeviceGuard() {
  int current = previous_;
  cudaGetDevice(&current);
  if (current != previous_) cudaSetDevice(previous_);
}

}  // namespace haste::cuda
