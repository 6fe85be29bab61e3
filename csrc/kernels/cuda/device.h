// What the CUDA half of the binary can tell about itself and the devices. Plain C++, no CUDA header.
#pragma once

#include <string>
#include <vector>

namespace haste::cuda {

// The targets that the binary holds machine code or PTX for, e.g. {"80", "86", "90", "120", "120+PTX"}.
std::vector<std::string> compiled_targets();

// nullptr if the kernels of this binary can run on the device, else one sentence: the device, its compute
// capability, what the binary holds, and the command that mends it. Cached per device; no synchronisation.
const char* device_problem(int device);

// Makes `device` current for the life of the object, then restores the previous one.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_;
};

}  // namespace haste::cuda
