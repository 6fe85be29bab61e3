// haste_ext._C: importing it registers torch.ops.haste.*; itself it only tells what was built and what this
// processor can run. No tensor passes through it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "kernels/cpu/paths.h"
#include "ops/tensors.h"

#ifdef HASTE_WITH_CUDA
#include "kernels/cuda/device.h"
#include "kernels/cuda/paths.h"
#endif

namespace py = pybind11;

namespace {

std::vector<std::string> cpu_paths() {
  std::vector<std::string> names;
  for (const auto path : haste::cpu::available_paths()) names.emplace_back(haste::cpu::path_name(path));
  return names;
}

#ifdef HASTE_WITH_CUDA
std::vector<std::string> cuda_paths() { return haste::cuda::compiled_paths(); }
#else
std::vector<std::string> cuda_paths() { return {}; }
#endif

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
  info["cuda_paths"] = cuda_paths();
  info["cpu_paths"] = cpu_paths();
  info["cpu_path"] = haste::cpu::path_name(haste::cpu::active_path());
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Registers torch.ops.haste.* and tells what this build holds";
  m.def("build_info", &build_info);
  m.def("cpu_paths", &cpu_paths, "The processor paths that can run here, narrowest first");
  m.def("force_cpu_path", &haste::cpu::force_path, py::arg("name"),
        "Use one processor path for this process; '' goes back to the widest");
  m.def("cuda_paths", &cuda_paths, "The CUDA paths that this build holds; a device takes the last that it can run");
#ifdef HASTE_WITH_CUDA
  m.def("force_cuda_path", &haste::cuda::force_path, py::arg("name"),
        "Use one CUDA path for this process, as HASTE_CUDA_PATH does; '' goes back to each device's own. 'hopper' is "
        "refused on a device that is not of compute capability 9.0; what its copy engine cannot read (fp32, rows off "
        "the 16-byte boundary) goes to the portable kernels all the same");
#endif
  m.def("missing_cuda", &haste::missing_cuda, "Why CUDA tensors cannot be taken; empty where they can");
}
