// The kernel paths: where a device has instructions of its own that an operation can use, a second set of kernels does.
// Plain C++, no CUDA header.
#pragma once

#include <string>
#include <vector>

namespace haste::cuda {

// The paths that this binary holds: "portable" (every device from compute capability 8.0 on) and, built for 9.0,
// "hopper" (attn_align_loss in 16 bits on compute capability 9.0).
std::vector<std::string> compiled_paths();

// Forces a path by name for this process, as HASTE_CUDA_PATH does; "" goes back to the best of each device. Throws
// std::invalid_argument (one sentence that lists what there is) for a path that this binary does not hold.
void force_path(const std::string& name);

// Whether the current device is to run the Hopper kernels. Returns nullptr, or in one sentence (static storage) why the
// path asked for cannot be.
const char* choose_path(bool* hopper);

// Whether the Hopper kernels are to multiply by 72 columns in instructions of 64 and of 8 (HASTE_HOPPER_SPLIT_N72=1):
// a way out should a device not take 72 at once, which no device has been asked yet. Returns as choose_path().
const char* choose_split(bool* split);

}  // namespace haste::cuda
