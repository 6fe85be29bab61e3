// Runs a block of CUDA threads on one host thread: each is a fiber that runs until it must wait for others.
#pragma once

#include <cuda_runtime.h>

#include <string>
#include <vector>

namespace emulation {

// What a device would be asked about; the tests set it.
struct Device {
  const char* name = "Emulated device";
  int major = 8, minor = 6;
  int multiprocessors = 3;               // few, so that persistent blocks get several work tiles each
  cudaError_t load_error = cudaSuccess;  // what loading a kernel says
  bool whole_panels = false;             // a transposed operand of wgmma may not end within a panel behind a whole one
};
extern Device device;

// Seeds the order in which waiting threads go on.
void set_seed(unsigned seed);

// Prints one sentence and ends the process: the kernel did what a device would punish or leave undefined.
[[noreturn]] void fail(const std::string& reason);

// A number below `count`, from the seed.
unsigned random_below(unsigned count);

// Waits for all 32 lanes of the warp; the last to arrive runs `perform` on the arguments of all of them.
using Perform = void (*)(void* const* arguments);
void meet_warp(Perform perform, void* argument);
int thread();
int lane();

// What the device does beside the threads: once, at some moment after this one, between two of their stretches.
void start_event(std::function<void()> event);

// The calling thread waits until somebody wakes the queue.
void wait_in(std::vector<int>& queue);
void wake(std::vector<int>& queue);

// Shared memory of the running block, as much of it as the launch asked for.
void* shared_memory();
void check_shared(const void* address, size_t bytes);

// A copy that arrives no sooner than the thread waits for it; until then the target holds NaN.
void start_copy(void* shared, const void* global, size_t bytes, bool valid);
void finish_copies();

// State of the primitives of arch_hopper.cuh (hopper_state.h): set up for a block, checked at its end, and what a block
// in which no thread can go on waits for.
void begin_hopper_block(int threads);
void end_hopper_block();
std::string stuck_hopper_block();

}  // namespace emulation
