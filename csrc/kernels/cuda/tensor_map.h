// How the copy engine (TMA) of compute capability 9.0 is told where an operand lies. No link with the driver's library.
#pragma once

#include <cuda.h>
#include "../attn_align_loss.h"

namespace haste::cuda {

// A kernel takes it as `const __grid_constant__` parameter. Its dimensions: (dim, token, head, batch).
using TensorMap = CUtensorMap;

// A panel is 64 columns of 16-bit elements: rows of 128 bytes, swizzled; see arch_hopper.cuh.
constexpr int kPanelColumns = 64;

// Whether the copy engine can read the operand where it lies: 16-bit elements, every row at a multiple of 16 bytes, and
// no two rows overlapping.
bool can_map(const AttnOperand& operand, int64_t batch, int64_t heads, int64_t tokens);

// Describes an operand that can_map() for loads of panels of `rows` tokens (≤ 256, a multiple of 8). What lies outside
// the tensor arrives as zeros. Returns nullptr, or what went wrong in one sentence (static storage).
const char* describe(TensorMap* map, const AttnOperand& operand, int64_t batch, int64_t heads, int64_t tokens,
                     int rows);

}  // namespace haste::cuda
