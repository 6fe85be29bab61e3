// Every operation of this project, once: X(name, Kernels), where `Kernels` is what an instruction set of the CPU offers
// for it. CMake reads the names here too, and compiles of each
//   ops/<name>.cpp                 its schemas, checks and launches
//   kernels/cpu/<name>.cpp         how the CPU shares it out to threads
//   kernels/cpu/isa/<name>.cpp     its CPU kernels, once per instruction set and type to compute in
//   kernels/cuda/<name>*.cu        its CUDA kernels
#pragma once

#define HASTE_OPERATIONS(X)                \
  X(attn_align_loss, AttnAlignKernels)     \
  X(token_cosine_loss, TokenCosineKernels) \
  X(taylor_extrapolate, TaylorKernels)
