// The sets of kernels: where a device has instructions of its own that an operation can use, a second set of kernels
// does. Plain C++, no CUDA header.
#pragma once

#include <string>
#include <vector>

namespace haste::cuda {

// Those that this binary holds: "portable" (every device from compute capability 8.0 on) and, built for 9.0, "hopper"
// (attn_align_loss in 16 bits on compute capability 9.0).
std::vector<std::string> compiled_kernels();

// Forces a set by name for this process, as HASTE_CUDA_KERNELS does; "" goes back to the best of each device. Throws
// std::invalid_argument (one sentence that lists what there is) for a set that this binary does not hold.
void force_kernels(const std::string& name);

// Whether the current device is to run the Hopper kernels. Returns nullptr, or in one sentence (static storage) why the
// set asked for cannot be.
const char* choose_kernels(bool* hopper);

// Whether the Hopper kernels are to multiply by 72 columns in instructions of 64 and of 8 (HASTE_HOPPER_SPLIT_N72=1):
// a way out should a device not take 72 at once, which no device has been asked yet. Returns as choose_kernels().
const char* choose_split(bool* split);

}  // namespace haste::cuda
