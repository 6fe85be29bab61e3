// What every kernel, CPU and CUDA, is told about a tensor: an address, an element type, strides.
// No torch header is included below csrc/kernels, so that a kernel compiles in seconds, on a machine
// with no GPU, and can be tested alone.
#pragma once

#include <cstdint>
#include <functional>

namespace haste {

enum class ScalarType : int { Float32, Float64, Float16, BFloat16 };

// Runs body(begin, end) over disjoint ranges of [0, count), in parallel where threads are to be had.
// The operations pass torch's own thread pool, so torch.set_num_threads is honoured.
using RangeBody = std::function<void(int64_t begin, int64_t end)>;
using ParallelFor = std::function<void(int64_t count, const RangeBody& body)>;

}  // namespace haste
