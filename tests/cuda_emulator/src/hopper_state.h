// What the parts of the emulation of arch_hopper.cuh know of one another.
#pragma once

#include <kernels/cuda/arch_hopper.cuh>

#include "emulator.h"

namespace emulation {

// Shared memory by its address on the device, as descriptors hold it. Fails if it is none.
const unsigned char* at_shared_address(uint32_t address);

// Threads reach shared memory by another way (proxy) than wgmma and the copy engine do: what a thread stored by one of
// the primitives these may read only when it has called fence_shared_for_async().
void mark_stored(const void* row, size_t bytes);
bool is_fenced(uint32_t address);

// A load of the copy engine arrives.
void expect_usable_by_copy_engine(haste::cuda::Barrier* barrier);
void complete_bytes(haste::cuda::Barrier* barrier, unsigned bytes);

void begin_mbarriers();
void end_mbarriers();
std::string stuck_mbarriers();
void begin_wgmma(int threads);
void end_wgmma();

}  // namespace emulation
