// Which set of kernels runs: what this binary holds, what the device is, what was asked for; see dispatch.h.
#include "dispatch.h"

#include <cuda_runtime.h>

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace haste::cuda {
namespace {

enum class KernelSet : int { Undecided, Best, Portable, Hopper };

std::atomic<KernelSet> chosen{KernelSet::Undecided};

KernelSet find_kernels(const std::string& argument, const std::string& name) {
  std::string held;
  for (const std::string& known : compiled_kernels()) {
    if (name == known) return name == "portable" ? KernelSet::Portable : KernelSet::Hopper;
    held += (held.empty() ? "" : ", ") + known;
  }
  throw std::invalid_argument(argument + " must be one of " + held + " in this build, got '" + name + "'");
}

KernelSet kernels_from_environment() {
  const char* name = std::getenv("HASTE_CUDA_KERNELS");
  return name && *name ? find_kernels("HASTE_CUDA_KERNELS", name) : KernelSet::Best;
}

// Machine code for sm_90a runs on compute capability 9.0 alone.
bool is_hopper() {
  int device = 0, major = 0, minor = 0;
  const bool known = cudaGetDevice(&device) == cudaSuccess &&
                     cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
                     cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess;
  return known && major == 9 && minor == 0;
}

}  // namespace

std::vector<std::string> compiled_kernels() {
#ifdef HASTE_HAS_HOPPER
  return {"portable", "hopper"};
#else
  return {"portable"};
#endif
}

void force_kernels(const std::string& name) {
  chosen = name.empty() ? KernelSet::Best : find_kernels("the set of CUDA kernels", name);
}

const char* choose_kernels(bool* hopper) {
  if (chosen == KernelSet::Undecided) {
    try {
      chosen = kernels_from_environment();
    } catch (const std::invalid_argument& error) {
      static const std::string reason = error.what();
      return reason.c_str();
    }
  }
#ifdef HASTE_HAS_HOPPER
  *hopper = chosen != KernelSet::Portable && is_hopper();
  if (chosen == KernelSet::Hopper && !*hopper) {
    return "the CUDA kernels 'hopper' were asked for, and the tensors' device is not of compute capability 9.0";
  }
#else
  *hopper = false;
#endif
  return nullptr;
}

const char* choose_split(bool* split) {
  static const std::string asked = [] {
    const char* value = std::getenv("HASTE_HOPPER_SPLIT_N72");
    return std::string(value ? value : "");
  }();
  *split = asked == "1";
  if (*split || asked.empty() || asked == "0") return nullptr;
  static const std::string reason = "HASTE_HOPPER_SPLIT_N72 must be 0 or 1, got '" + asked + "'";
  return reason.c_str();
}

}  // namespace haste::cuda
