// What the tests of the emulation itself run; see faults.cpp.
#pragma once

#include <cstdint>
#include <string>

namespace haste::cuda {

// Starts the kernel of this name on 64 floats. Returns nullptr, or what went wrong.
const char* launch_fault(const std::string& name, const float* source, float* target);

// The stand-ins for CUDA's 16-bit types: there, and back again.
void convert(const float* source, int64_t count, uint16_t* half, uint16_t* bfloat16, float* from_half,
             float* from_bfloat16);

}  // namespace haste::cuda
