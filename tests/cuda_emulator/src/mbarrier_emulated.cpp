// mbarriers: phases that end when all arrivals and all bytes are there. What this sees: waits for a phase that never
// ends, wrong numbers of arrivals and of bytes, barriers that were not set up, or not made known to the copy engine, or
// overwritten.
#include <map>

#include "hopper_state.h"

namespace emulation {
namespace {

using haste::cuda::Barrier;

constexpr int kMostBytes = (1 << 20) - 1;

struct State {
  unsigned arrivals = 0, missing = 0;  // of every phase; of this one
  int bytes = 0;                       // expected and not there yet, or there and not expected yet
  unsigned phase = 0;
  bool fenced = false;
  Barrier content = 0;
  std::vector<int> waiting;
};

std::map<Barrier*, State> barriers;

State& state_of(Barrier* barrier) {
  check_shared(barrier, sizeof(Barrier));
  const auto found = barriers.find(barrier);
  if (found == barriers.end()) fail("an mbarrier is used that was not initialised");
  if (*barrier != found->second.content) fail("an mbarrier was overwritten");
  return found->second;
}

// Something came to the phase. The content is opaque, as on a device; here it tells whether somebody wrote over it.
void advance(Barrier* barrier, State& state) {
  if (state.missing == 0 && state.bytes == 0) {
    state.missing = state.arrivals;
    ++state.phase;
    wake(state.waiting);
  }
  *barrier = state.content = state.content * 6364136223846793005u + 1442695040888963407u;
}

void arrive(Barrier* barrier, unsigned bytes) {
  State& state = state_of(barrier);
  if (state.missing == 0) fail("more threads arrive at a phase of an mbarrier than it expects");
  --state.missing;
  state.bytes += static_cast<int>(bytes);
  if (state.bytes > kMostBytes) fail("a phase of an mbarrier expects more bytes than it can count");
  advance(barrier, state);
}

}  // namespace

void begin_mbarriers() { barriers.clear(); }

void end_mbarriers() {
  for (const auto& [barrier, state] : barriers) {
    if (state.bytes != 0) fail("a block ends while an mbarrier lacks bytes, or has more than it expected");
  }
}

std::string stuck_mbarriers() {
  for (const auto& [barrier, state] : barriers) {
    if (state.waiting.empty()) continue;
    return "a thread waits for a phase of an mbarrier that lacks " + std::to_string(state.missing) + " arrivals and " +
           std::to_string(state.bytes) + " bytes";
  }
  return "";
}

void expect_usable_by_copy_engine(Barrier* barrier) {
  if (!state_of(barrier).fenced) fail("the copy engine is given an mbarrier without barrier_init_fence");
}

void complete_bytes(Barrier* barrier, unsigned bytes) {
  State& state = state_of(barrier);
  state.bytes -= static_cast<int>(bytes);
  advance(barrier, state);
}

}  // namespace emulation

namespace haste::cuda {

using namespace emulation;

void barrier_init(Barrier* barrier, unsigned arrivals) {
  check_shared(barrier, sizeof(Barrier));
  if (arrivals < 1 || arrivals >= 1u << 20) fail("an mbarrier expects from 1 to 2^20 - 1 arrivals");
  State& state = barriers[barrier] = State{};
  state.arrivals = state.missing = arrivals;
  *barrier = state.content = random_below(1u << 31);
}

void barrier_init_fence() {
  for (auto& [barrier, state] : barriers) state.fenced = true;
}

void barrier_arrive(Barrier* barrier) { arrive(barrier, 0); }
void barrier_arrive_and_expect(Barrier* barrier, unsigned bytes) { arrive(barrier, bytes); }

// A thread that comes late finds the parity of the phase after the next: on a device, too, it then waits on.
void barrier_wait(Barrier* barrier, unsigned parity) {
  if (parity > 1) fail("the parity of a phase is 0 or 1");
  while ((state_of(barrier).phase & 1) == parity) wait_in(state_of(barrier).waiting);
}

}  // namespace haste::cuda
