// The emulated kernels as a program: one request on standard input, the buffers that it asks back on standard output.
//
// `int major` and `int minor` set the compute capability of the device, if they are there.
// A request is lines of `op NAME`, `int NAME VALUE`, `real NAME VALUE`, `text NAME VALUE`, `buffer NAME BYTES` and
// `return NAME`, closed by `end`; then the buffers' contents in the order of their lines. Every buffer is a heap
// block of exactly its size, so that the address sanitizer sees a kernel that leaves it.
// Exit status: 0, 3 if the operation refused (its sentence on standard error), 4 if the emulation stopped the kernel.
#include <kernels/attn_align_loss.h>
#include <kernels/cuda/device.h>
#include <kernels/taylor_extrapolate.h>
#include <kernels/token_cosine_loss.h>

#include <iostream>
#include <map>
#include <memory>
#include <new>
#include <string>

#include "emulator.h"
#include "faults.h"
#include "hopper_primitives.h"

namespace {

using namespace haste;

struct Buffer {
  struct Free {
    void operator()(char* p) const { ::operator delete[](p, std::align_val_t(256)); }  // as aligned as cudaMalloc's
  };
  size_t bytes;
  std::unique_ptr<char[], Free> data;
  explicit Buffer(size_t n) : bytes(n), data(new (std::align_val_t(256)) char[n]) {}
};

struct Request {
  std::string op;
  std::map<std::string, int64_t> ints;
  std::map<std::string, double> reals;
  std::map<std::string, std::string> texts;
  std::map<std::string, Buffer> buffers;
  std::vector<std::string> returned;

  static Request read(std::istream& in) {
    Request request;
    std::vector<std::string> order;
    for (std::string kind, name; in >> kind && kind != "end";) {
      in >> name;
      if (kind == "op") {
        request.op = name;
      } else if (kind == "int") {
        in >> request.ints[name];
      } else if (kind == "real") {
        in >> request.reals[name];
      } else if (kind == "text") {
        std::getline(in >> std::ws, request.texts[name]);
      } else if (kind == "buffer") {
        size_t bytes = 0;
        in >> bytes;
        request.buffers.emplace(name, bytes);
        order.push_back(name);
      } else if (kind == "return") {
        request.returned.push_back(name);
      }
    }
    in.get();  // the newline after `end`
    for (const auto& name : order) {
      Buffer& buffer = request.buffers.at(name);
      in.read(buffer.data.get(), static_cast<std::streamsize>(buffer.bytes));
    }
    if (!in) emulation::fail("the request is incomplete");
    return request;
  }

  int64_t integer(const std::string& name) const { return ints.at(name); }
  ScalarType type(const std::string& name) const { return static_cast<ScalarType>(integer(name)); }

  // A tensor's first element: buffer NAME, NAME.offset bytes into it; null if there is no such buffer.
  void* pointer(const std::string& name) const {
    const auto found = buffers.find(name);
    return found == buffers.end() ? nullptr : found->second.data.get() + integer(name + ".offset");
  }
  int64_t stride(const std::string& name, int dimension) const {
    const auto found = ints.find(name + ".stride" + std::to_string(dimension));
    return found == ints.end() ? 0 : found->second;
  }
};

AttnAlignProblem attn_problem(const Request& r) {
  const auto operand = [&](const std::string& name, const std::string& model) -> AttnOperand {
    return {r.pointer(name),   r.type("type"),    r.integer(model + "_dim"),
            r.stride(name, 0), r.stride(name, 1), r.stride(name, 2)};
  };
  return {r.integer("batch"),
          r.integer("heads"),
          r.integer("tokens"),
          operand("student_q", "student"),
          operand("student_k", "student"),
          operand("teacher_q", "teacher"),
          operand("teacher_k", "teacher"),
          r.reals.at("student_scale"),
          r.reals.at("teacher_scale"),
          r.ints.count("kl") != 0 && r.integer("kl") != 0,
          r.ints.count("causal") != 0 ? r.integer("causal") : 0};
}

const char* attn_forward(const Request& r) {
  return cuda::attn_align_loss_forward(
      attn_problem(r), {r.pointer("loss"), r.pointer("student_softmax"), r.pointer("teacher_softmax")}, nullptr);
}

const char* attn_backward(const Request& r) {
  const auto gradient = [&](const std::string& name) -> AttnGradient {
    return {r.pointer(name), r.stride(name, 0), r.stride(name, 1), r.stride(name, 2)};
  };
  const AttnAlignBackward backward{
      {r.pointer("grad_out"), r.stride("grad_out", 0), r.stride("grad_out", 1), r.stride("grad_out", 2)},
      r.pointer("student_softmax"),
      r.pointer("teacher_softmax"),
      gradient("grad_q"),
      gradient("grad_k")};
  return cuda::attn_align_loss_backward(attn_problem(r), backward, nullptr);
}

TokenCosineProblem cosine_problem(const Request& r) {
  const auto operand = [&](const std::string& name) -> TokenOperand {
    return {r.pointer(name), r.type(name + "_type"), r.stride(name, 0), r.stride(name, 1)};
  };
  return {r.integer("outer"), r.integer("inner"), r.integer("dim"), operand("student"), operand("teacher")};
}

const char* cosine_forward(const Request& r) {
  return cuda::token_cosine_loss_forward(cosine_problem(r), static_cast<float*>(r.pointer("loss")), nullptr);
}

const char* cosine_backward(const Request& r) {
  const TokenGradient grad_out{r.pointer("grad_out"), r.stride("grad_out", 0), r.stride("grad_out", 1)};
  return cuda::token_cosine_loss_backward(cosine_problem(r), grad_out, r.pointer("gradient"), nullptr);
}

const char* taylor(const Request& r) {
  TaylorProblem p{};
  p.steps = r.integer("steps");
  p.layers = r.integer("layers");
  p.slots = r.integer("slots");
  p.batch = r.integer("batch");
  p.tokens = r.integer("tokens");
  p.dim = r.integer("dim");
  p.snapshots = r.pointer("snapshots");
  p.snapshot_type = r.type("snapshot_type");
  p.snapshot_stride_layer = r.stride("snapshots", 0);
  p.snapshot_stride_slot = r.stride("snapshots", 1);
  p.snapshot_stride_batch = r.stride("snapshots", 2);
  p.snapshot_stride_token = r.stride("snapshots", 3);
  p.weights = static_cast<const float*>(r.pointer("weights"));
  p.weight_stride_step = r.stride("weights", 0);
  p.weight_stride_layer = r.stride("weights", 1);
  p.weight_stride_slot = r.stride("weights", 2);
  p.gates = r.pointer("gates");
  p.gate_stride_step = r.stride("gates", 0);
  p.gate_stride_layer = r.stride("gates", 1);
  p.gate_stride_batch = r.stride("gates", 2);
  p.residual = r.pointer("residual");
  p.residual_stride_batch = r.stride("residual", 0);
  p.residual_stride_token = r.stride("residual", 1);
  p.out = r.pointer("out");
  p.out_type = r.type("out_type");
  return cuda::taylor_extrapolate(p, nullptr);
}

// What a user would read on a device of this name and capability that answers a kernel load with this error.
const char* device_problem(const Request& r) {
  static std::string name = r.texts.at("name");
  emulation::device.name = name.c_str();
  emulation::device.load_error = static_cast<cudaError_t>(r.integer("load_error"));
  return cuda::device_problem(0);
}

const char* fault(const Request& r) {
  return cuda::launch_fault(r.texts.at("name"), static_cast<const float*>(r.pointer("source")),
                            static_cast<float*>(r.pointer("target")));
}

const char* panel(const Request& r) {
  const auto integer = [&](const char* name) { return static_cast<int>(r.integer(name)); };
  const AttnOperand operand{r.pointer("operand"),   r.type("type"),         r.integer("dim"),
                            r.stride("operand", 0), r.stride("operand", 1), r.stride("operand", 2)};
  return cuda::load_one_panel({operand, r.integer("batch"), r.integer("heads"), r.integer("tokens"), integer("rows"),
                               integer("column"), integer("token"), integer("head"), integer("sample")},
                              static_cast<uint16_t*>(r.pointer("panel")));
}

const char* product(const Request& r) {
  return cuda::multiply({r.pointer("a"), r.pointer("b"), r.type("type"), static_cast<int>(r.integer("columns")),
                         static_cast<int>(r.integer("depth")), r.integer("transpose_a") != 0,
                         r.integer("transpose_b") != 0, r.texts.at("a_from")},
                        static_cast<float*>(r.pointer("c")));
}

const char* ring(const Request& r) {
  return cuda::run_ring(r.pointer("a"), r.pointer("b"), r.integer("tokens"), r.texts.at("name"),
                        static_cast<float*>(r.pointer("c")));
}

const char* relay(const Request& r) {
  return cuda::run_relay(r.texts.at("name"), static_cast<float*>(r.pointer("numbers")));
}

const char* convert(const Request& r) {
  cuda::convert(static_cast<const float*>(r.pointer("source")), r.integer("count"),
                static_cast<uint16_t*>(r.pointer("half")), static_cast<uint16_t*>(r.pointer("bfloat16")),
                static_cast<float*>(r.pointer("from_half")), static_cast<float*>(r.pointer("from_bfloat16")));
  return nullptr;
}

}  // namespace

int main() {
  const std::map<std::string, const char* (*)(const Request&)> operations{
      {"attn_align_loss_forward", attn_forward},
      {"attn_align_loss_backward", attn_backward},
      {"token_cosine_loss_forward", cosine_forward},
      {"token_cosine_loss_backward", cosine_backward},
      {"taylor_extrapolate", taylor},
      {"device_problem", device_problem},
      {"fault", fault},
      {"convert", convert},
      {"panel", panel},
      {"product", product},
      {"ring", ring},
      {"relay", relay}};
  std::ios::sync_with_stdio(false);
  const Request request = Request::read(std::cin);
  emulation::set_seed(static_cast<unsigned>(request.integer("seed")));
  if (request.ints.count("major") == 1) {
    emulation::device.major = static_cast<int>(request.integer("major"));
    emulation::device.minor = static_cast<int>(request.integer("minor"));
  }
  emulation::device.whole_panels = request.ints.count("whole_panels") == 1;
  if (const char* refusal = operations.at(request.op)(request)) {
    std::cerr << refusal << "\n";
    return 3;
  }
  for (const auto& name : request.returned) {
    const Buffer& buffer = request.buffers.at(name);
    std::cout.write(buffer.data.get(), static_cast<std::streamsize>(buffer.bytes));
  }
}
