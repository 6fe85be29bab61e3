// The copy engine: loads that arrive at some later moment, NaN until then, swizzled by the bits of the shared address,
// zeros for what lies outside the tensor. What this sees: reading before the barrier, descriptions and targets that are
// not aligned, targets that leave shared memory, or that a thread stored to without fence_shared_for_async.
#include <cuda.h>

#include "hopper_state.h"

namespace emulation {
namespace {

using haste::cuda::Barrier;
using haste::cuda::TensorMap;

constexpr int kDimensions = 4;
constexpr uint64_t kMade = 0x7e45'0a2d'3a90'0001;  // tells a description from other memory

struct Description {
  uint64_t made;
  const unsigned char* address;
  uint32_t sizes[kDimensions];
  uint64_t strides[kDimensions - 1];
  uint16_t box[kDimensions];
  uint32_t swizzle;
};
static_assert(sizeof(Description) <= sizeof(TensorMap));

Description description_in(const TensorMap& map) {
  Description description;
  std::memcpy(&description, &map, sizeof(description));
  if (description.made != kMade) fail("the copy engine is given a description that was not made");
  return description;
}

// Bits 4 and up of an address in shared memory ^= bits 7 and up: 3 of them in the 128-byte swizzle, then 2, 1, 0.
uint32_t swizzled(uint32_t address, uint32_t swizzle) {
  return address ^ ((address >> 7 & ((1u << swizzle) - 1)) << 4);
}

unsigned char* writable(uint32_t address) { return const_cast<unsigned char*>(at_shared_address(address)); }

void write_box(const Description& d, uint32_t target, const int (&start)[kDimensions]) {
  const uint32_t row_bytes = d.box[0] * 2u;
  for (uint32_t row = 0; row < d.box[1]; ++row) {
    const int64_t token = int64_t{start[1]} + row;
    const bool row_inside = token >= 0 && token < d.sizes[1] && start[2] >= 0 && start[2] < int64_t{d.sizes[2]} &&
                            start[3] >= 0 && start[3] < int64_t{d.sizes[3]};
    for (uint32_t column = 0; column < d.box[0]; ++column) {
      const int64_t c = int64_t{start[0]} + column;
      uint16_t value = 0;
      if (row_inside && c >= 0 && c < d.sizes[0]) {
        const uint64_t offset = token * d.strides[0] + start[2] * d.strides[1] + start[3] * d.strides[2] + c * 2;
        std::memcpy(&value, d.address + offset, sizeof(value));
      }
      std::memcpy(writable(swizzled(target + row * row_bytes + column * 2, d.swizzle)), &value, sizeof(value));
    }
  }
}

}  // namespace
}  // namespace emulation

using namespace emulation;

// The requirements are those that the driver's documentation states.
CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType, cuuint32_t rank, void* address,
                                const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                                const cuuint32_t* steps, CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  constexpr uint32_t kSwizzleBytes[] = {1u << 31, 32, 64, 128};
  const auto aligned = [](uint64_t value, uint64_t alignment) { return value % alignment == 0; };
  bool valid = rank == kDimensions && aligned(reinterpret_cast<uintptr_t>(map), 64) &&
               aligned(reinterpret_cast<uintptr_t>(address), 16) && aligned(box[0] * 2, 16) &&
               box[0] * 2 <= kSwizzleBytes[swizzle];
  for (int i = 0; valid && i < kDimensions; ++i) {
    valid = sizes[i] >= 1 && sizes[i] <= uint64_t{1} << 32 && box[i] >= 1 && box[i] <= 256 && steps[i] == 1 &&
            (i == 0 || (aligned(strides[i - 1], 16) && strides[i - 1] < uint64_t{1} << 40));
  }
  if (!valid) return CUDA_ERROR_INVALID_VALUE;
  Description description{kMade, static_cast<const unsigned char*>(address)};
  description.swizzle = static_cast<uint32_t>(swizzle);
  for (int i = 0; i < kDimensions; ++i) {
    description.sizes[i] = static_cast<uint32_t>(sizes[i]);
    description.box[i] = static_cast<uint16_t>(box[i]);
    if (i > 0) description.strides[i - 1] = strides[i - 1];
  }
  std::memcpy(map, &description, sizeof(description));
  return CUDA_SUCCESS;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  const bool known = std::string(symbol) == "cuTensorMapEncodeTiled";
  *function = known ? reinterpret_cast<void*>(&cuTensorMapEncodeTiled) : nullptr;
  *result = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

namespace haste::cuda {

void prefetch(const TensorMap& map) { description_in(map); }

void load_panel(void* shared, const TensorMap& map, Barrier* barrier, int column, int token, int head, int batch) {
  if (emulation::device.major < 9) fail("the device has no copy engine");
  const Description description = description_in(map);
  const uint32_t target = shared_address(shared);
  const unsigned bytes = description.box[0] * description.box[1] * 2u;
  if (target % kPanelAlignment != 0) fail("a panel does not begin at a multiple of 1024 bytes");
  expect_usable_by_copy_engine(barrier);
  for (unsigned i = 0; i < bytes; i += 16) {
    if (!is_fenced(target + i)) fail("the copy engine overwrites what a thread stored without fence_shared_for_async");
  }
  std::memset(writable(target + bytes - 1) - (bytes - 1), 0xff, bytes);
  start_event([=] {
    write_box(description, target, {column, token, head, batch});
    complete_bytes(barrier, bytes);
  });
}

}  // namespace haste::cuda
