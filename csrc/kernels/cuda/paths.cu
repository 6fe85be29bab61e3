// Which kernel path runs: what this binary holds, what the device is, what was asked for; see paths.h.
#include "paths.h"

#include <cuda_runtime.h>

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace haste::cuda {
namespace {

enum class Path : int { Undecided, Best, Portable, Hopper };

std::atomic<Path> chosen{Path::Undecided};

Path find_path(const std::string& argument, const std::string& name) {
  std::string held;
  for (const std::string& path : compiled_paths()) {
    if (name == path) return name == "portable" ? Path::Portable : Path::Hopper;
    held += (held.empty() ? "" : ", ") + path;
  }
  throw std::invalid_argument(argument + " is '" + name + "'; it must be one of the paths that this build holds: " +
                              held);
}

Path path_from_environment() {
  const char* name = std::getenv("HASTE_CUDA_PATH");
  return name && *name ? find_path("HASTE_CUDA_PATH", name) : Path::Best;
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

std::vector<std::string> compiled_paths() {
#ifdef HASTE_HAS_HOPPER
  return {"portable", "hopper"};
#else
  return {"portable"};
#endif
}

void force_path(const std::string& name) { chosen = name.empty() ? Path::Best : find_path("the CUDA path", name); }

const char* choose_path(bool* hopper) {
  if (chosen == Path::Undecided) {
    try {
      chosen = path_from_environment();
    } catch (const std::invalid_argument& error) {
      static const std::string reason = error.what();
      return reason.c_str();
    }
  }
#ifdef HASTE_HAS_HOPPER
  *hopper = chosen != Path::Portable && is_hopper();
  if (chosen == Path::Hopper && !*hopper) {
    return "the CUDA path 'hopper' was asked for, and the tensors' device is not of compute capability 9.0";
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
  static const std::string reason = "HASTE_HOPPER_SPLIT_N72 is '" + asked + "'; it must be 0 or 1";
  return reason.c_str();
}

}  // namespace haste::cuda
