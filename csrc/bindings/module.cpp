// haste_ext._C: importing it registers torch.ops.haste.*; itself it only tells what was built and what this
// processor can run. No tensor passes through it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "kernels/cpu/dispatch.h"
#include "ops/common.h"

#ifdef HASTE_WITH_CUDA
#include "kernels/cuda/device.h"
#include "kernels/cuda/dispatch.h"
#endif

namespace py = pybind11;

namespace {

std::vector<std::string> cpu_capabilities() {
  std::vector<std::string> names;
  for (const auto isa : haste::cpu::available_isas()) names.emplace_back(haste::cpu::isa_name(isa));
  return names;
}

std::vector<std::string> cuda_kernels() {
#ifdef HASTE_WITH_CUDA
  return haste::cuda::compiled_kernels();
#else
  return {};
#endif
}

py::dict build_info() {
  py::dict info;
  info["version"] = HASTE_VERSION;
  info["torch"] = HASTE_TORCH_VERSION;
  info["compiler"] = HASTE_COMPILER;
#ifdef HASTE_WITH_CUDA
  info["cuda"] = true;
  info["cuda_compiler"] = HASTE_CUDA_COMPILER;
  info["cuda_targets"] = haste::cuda::compiled_targets();
#else
  info["cuda"] = false;
  info["cuda_compiler"] = py::none();
  info["cuda_targets"] = std::vector<std::string>();
#endif
  info["cuda_kernels"] = cuda_kernels();
  info["cpu_capabilities"] = cpu_capabilities();
  info["cpu_capability"] = haste::cpu::isa_name(haste::cpu::active_isa());
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Registers torch.ops.haste.* and tells what this build holds";
  m.def("build_info", &build_info);
  m.def("cpu_capabilities", &cpu_capabilities, "The instruction sets that can run here, narrowest first");
  m.def("force_cpu_capability", &haste::cpu::force_isa, py::arg("name"),
        "Use one instruction set for this process; '' goes back to the widest");
  m.def("cuda_kernels", &cuda_kernels,
        "The sets of CUDA kernels that this build holds; a device takes the last that it can run");
#ifdef HASTE_WITH_CUDA
  m.def("force_cuda_kernels", &haste::cuda::force_kernels, py::arg("name"),
        "Use one set of CUDA kernels for this process, as HASTE_CUDA_KERNELS does; '' goes back to each device's own. "
        "'hopper' is refused on a device that is not of compute capability 9.0; what its copy engine cannot read "
        "(fp32, rows off the 16-byte boundary) goes to the portable kernels all the same");
#endif
  m.def("missing_cuda", &haste::missing_cuda, "Why CUDA tensors cannot be taken; empty where they can");
}
