// The primitives of csrc/kernels/cuda/arch_hopper.cuh on the host, by the PTX ISA: addresses in shared memory, what
// separates a thread's stores from asynchronous reads, barriers of parts of a block, the registers that warpgroups
// take from each other. mbarriers, copies and products are in files of their own.
//
// What this sees besides what emulator.cpp says: see those files. What it cannot see: stores to shared memory by other
// means than store_matrices() that lack fence_shared_for_async(); how many registers a kernel is launched with; where
// the compiler moves a use of registers that a product owns (fence_registers).
#include <map>

#include "hopper_state.h"
#include "warp.h"

namespace emulation {
namespace {

constexpr uint32_t kSharedStart = 1024;  // a device keeps the first kilobyte for itself
constexpr int kBarriers = 16;
constexpr size_t kChunk = 16;
constexpr int kRegisterFile = 65536;

struct NamedBarrier {
  int expected = 0, arrived = 0;
  std::map<int, int> lanes_of_warp;
  std::vector<int> waiting;
};

NamedBarrier named_barriers[kBarriers];
std::map<uint32_t, int> stored_by;     // chunks of 16 bytes that a thread stored and has not fenced
std::map<int, int> registers_of_warp;  // where a warp has asked for a number

void join(int id, int threads, bool wait) {
  if (id < 1 || id >= kBarriers) fail("a block has barriers 1 to 15 besides that of __syncthreads");
  if (threads < 32 || threads % 32 != 0 || threads > static_cast<int>(blockDim.x)) {
    fail("a barrier is for whole warps of the block");
  }
  NamedBarrier& barrier = named_barriers[id];
  if (barrier.arrived > 0 && barrier.expected != threads) fail("threads meet at a barrier with different counts");
  barrier.expected = threads;
  ++barrier.lanes_of_warp[thread() / 32];
  if (++barrier.arrived < threads) {
    if (wait) wait_in(barrier.waiting);
    return;
  }
  for (const auto& [warp, lanes] : barrier.lanes_of_warp) {
    if (lanes % 32 != 0) fail("not all lanes of a warp come to a barrier");
  }
  wake(barrier.waiting);
  barrier = NamedBarrier{};
}

// The calls hold for whole warpgroups. What is shared out is what the block was launched with: a multiple of 8 for every
// thread of as many whole warpgroups as it begins.
void check_registers() {
  const int threads = (static_cast<int>(blockDim.x) + 127) / 128 * 128, launched = kRegisterFile / threads / 8 * 8;
  int registers = 0;
  for (const auto& [warp, count] : registers_of_warp) {
    for (int other = warp / 4 * 4; other < warp / 4 * 4 + 4; ++other) {
      const auto found = registers_of_warp.find(other);
      if (found == registers_of_warp.end() || found->second != count) {
        fail("the warps of a warpgroup ask for different numbers of registers");
      }
    }
    registers += 32 * count;
  }
  if (registers > threads * launched) fail("the warpgroups take more registers than there are");
}

}  // namespace

void begin_hopper_block(int threads) {
  for (NamedBarrier& barrier : named_barriers) barrier = NamedBarrier{};
  stored_by.clear();
  registers_of_warp.clear();
  begin_mbarriers();
  begin_wgmma(threads);
}

void end_hopper_block() {
  for (const NamedBarrier& barrier : named_barriers) {
    if (barrier.arrived > 0) fail("a block ends with threads counted in at a barrier that is not complete");
  }
  check_registers();
  end_mbarriers();
  end_wgmma();
}

std::string stuck_hopper_block() {
  const std::string why = stuck_mbarriers();
  if (!why.empty()) return "the block is stuck: " + why;
  return "the block is stuck: some threads wait for others that have ended or wait elsewhere";
}

const unsigned char* at_shared_address(uint32_t address) {
  const auto* pointer = static_cast<const unsigned char*>(shared_memory()) + (address - kSharedStart);
  if (address < kSharedStart) fail("an address is not in shared memory");
  check_shared(pointer, 1);
  return pointer;
}

void mark_stored(const void* row, size_t bytes) {
  const uint32_t first = haste::cuda::shared_address(row) / kChunk;
  for (uint32_t chunk = first; chunk < first + bytes / kChunk; ++chunk) stored_by[chunk] = thread();
}

bool is_fenced(uint32_t address) { return stored_by.empty() || stored_by.count(address / kChunk) == 0; }

}  // namespace emulation

namespace haste::cuda {

using namespace emulation;

void* panel_memory() { return shared_memory(); }

uint32_t shared_address(const void* pointer) {
  check_shared(pointer, 1);
  return kSharedStart + static_cast<uint32_t>(static_cast<const unsigned char*>(pointer) -
                                              static_cast<const unsigned char*>(shared_memory()));
}

void sync_threads(int barrier_id, int threads) { join(barrier_id, threads, true); }
void arrive_threads(int barrier_id, int threads) { join(barrier_id, threads, false); }

void fence_shared_for_async() {
  for (auto chunk = stored_by.begin(); chunk != stored_by.end();) {
    chunk = chunk->second == thread() ? stored_by.erase(chunk) : std::next(chunk);
  }
}

void set_registers(int count, bool take) {
  int& registers = registers_of_warp.emplace(thread() / 32, take ? 0 : 256).first->second;
  const bool wrong_way = take ? count < registers : count > registers;
  if (wrong_way) fail("a warpgroup takes fewer registers than it has, or releases more");
  registers = count;
}

// stmatrix: lane 8·i + r names row r of matrix i.
template <bool kTransposed>
void store_matrices_of_warp(void* row, const uint32_t (&registers)[4]) {
  struct Argument {
    void* row;
    const uint32_t* registers;
  } argument{row, registers};
  check_shared(row, 16);
  mark_stored(row, 16);
  meet_warp(argument, [](void* const* arguments) {
    for (int lane = 0; lane < 32; ++lane) {
      for (int matrix = 0; matrix < 4; ++matrix) {
        for (int i = 0; i < 2; ++i) {
          const int r = kTransposed ? lane % 4 * 2 + i : lane / 4, c = kTransposed ? lane / 4 : lane % 4 * 2 + i;
          static_cast<uint16_t*>(at<Argument>(arguments, 8 * matrix + r).row)[c] =
              static_cast<uint16_t>(at<Argument>(arguments, lane).registers[matrix] >> 16 * i);
        }
      }
    }
  });
}

void store_matrices(void* row, const uint32_t (&registers)[4]) { store_matrices_of_warp<false>(row, registers); }
void store_matrices_transposed(void* row, const uint32_t (&registers)[4]) {
  store_matrices_of_warp<true>(row, registers);
}

}  // namespace haste::cuda
