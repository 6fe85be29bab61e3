// The processor from compute capability 9.0 on ("Hopper", sm_90a), in one thin layer as arch.cuh: mbarriers, the copy
// engine (TMA), and products of a warpgroup (wgmma). The facts are those of the PTX ISA, "wgmma", "mbarrier", "tensor".
//
// A *panel* is R rows (a multiple of 8) of 64 16-bit columns: 128 bytes a row, its base a multiple of 1024, and the
// 16-byte chunk c of row r lies where chunk c ^ (r % 8) would ("128-byte swizzle": bits 4–6 of the address ^= bits
// 7–9). The copy engine writes it so and wgmma reads it so, both by the bits of the address itself, hence the 1024.
//
// Accumulator of a warpgroup, 64 × kColumns: warp w of its 4 owns rows 16·w to 16·w + 15, and of these c[j] is the
// 16 × 8 accumulator of arch.cuh for columns 8·j to 8·j + 7. A in registers: the same rows, the A fragment of arch.cuh.
#pragma once

#include "arch.cuh"
#include "tensor_map.h"

namespace haste::cuda {

constexpr int kWarpgroupSize = 128;  // 4 warps in a row, the first one's index a multiple of 4
constexpr unsigned kPanelRowBytes = 128;
constexpr unsigned kPanelAlignment = 1024;

// An mbarrier, in shared memory. Its phases alternate between parity 0, with which it begins, and 1. A phase is
// complete when all arrivals and all bytes that it expects are there; the next then begins with the same arrivals.
using Barrier = uint64_t;

#ifdef HASTE_EMULATED

void* panel_memory();
uint32_t shared_address(const void* pointer);

void barrier_init(Barrier* barrier, unsigned arrivals);
void barrier_init_fence();
void barrier_arrive(Barrier* barrier);
void barrier_arrive_and_expect(Barrier* barrier, unsigned bytes);
void barrier_wait(Barrier* barrier, unsigned parity);

void prefetch(const TensorMap& map);
void load_panel(void* shared, const TensorMap& map, Barrier* barrier, int column, int token, int head, int batch);
inline void prefetch_panel(const TensorMap&, int, int, int, int) {}

void sync_threads(int barrier_id, int threads);
void arrive_threads(int barrier_id, int threads);
void fence_shared_for_async();
void set_registers(int count, bool take);
template <int kRegisters>
void take_registers() {
  set_registers(kRegisters, true);
}
template <int kRegisters>
void release_registers() {
  set_registers(kRegisters, false);
}

inline int lane_index() { return static_cast<int>(threadIdx.x) % kWarpSize; }
inline int warp_index() { return static_cast<int>(threadIdx.x) / kWarpSize; }

void store_matrices(void* row, const uint32_t (&registers)[4]);
void store_matrices_transposed(void* row, const uint32_t (&registers)[4]);

template <int kCells>
void fence_registers(float (&c)[kCells][4]) {}
template <int kCount>
void fence_registers(uint32_t (&a)[kCount][4]) {}
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(int pending);
template <int kPending>
void wgmma_wait() {
  wgmma_wait(kPending);
}
template <typename T, int kColumns, bool kTransposeA, bool kTransposeB>
void wgmma(float (&c)[kColumns / 8][4], uint64_t a, uint64_t b, bool add);
template <typename T, int kColumns, bool kTransposeB>
void wgmma(float (&c)[kColumns / 8][4], const uint32_t (&a)[4], uint64_t b, bool add);

#else

// Dynamic shared memory as dynamic_shared_memory(), its base aligned for panels.
__device__ inline void* panel_memory() {
  extern __shared__ __align__(1024) uint4 haste_panel_memory[];
  return haste_panel_memory;
}

// One thread sets a barrier up, then calls barrier_init_fence(); then __syncthreads() lets the others use it.
__device__ inline void barrier_init(Barrier* barrier, unsigned arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// Also for the copy engine, which comes to the barrier by another way (proxy) than the threads do.
__device__ inline void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
}

__device__ inline void barrier_arrive(Barrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(shared_address(barrier)) : "memory");
}

// Arrives, and lets this phase wait for so many bytes of load_panel() besides (fewer than 2^20).
__device__ inline void barrier_arrive_and_expect(Barrier* barrier, unsigned bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

// Returns when the barrier's current phase is not the one of this parity: when that one is complete, or, on a new
// barrier, at once for parity 1. try_wait itself sleeps for a while and may return early, hence the loop.
__device__ inline void barrier_wait(Barrier* barrier, unsigned parity) {
  unsigned complete;
  do {
    asm volatile(
        "{\n"
        ".reg .pred complete;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 complete, [%1], %2;\n"
        "selp.u32 %0, 1, 0, complete;\n"
        "}\n"
        : "=r"(complete)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  } while (complete == 0);
}

// Lets the copy engine fetch the description itself ahead of the first load.
__device__ inline void prefetch(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];\n" ::"l"(reinterpret_cast<uint64_t>(&map)) : "memory");
}

// One thread starts the load of one panel, from this column and token on; they may lie outside. It counts the bytes of
// the whole panel on the barrier, those included that lie outside the tensor and are written as zeros. A block that
// is no cluster's addresses its own memory in shared::cluster as in shared::cta.
__device__ inline void load_panel(void* shared, const TensorMap& map, Barrier* barrier, int column, int token, int head,
                                  int batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];\n" ::"r"(shared_address(shared)),
      "l"(reinterpret_cast<uint64_t>(&map)), "r"(shared_address(barrier)), "r"(column), "r"(token), "r"(head),
      "r"(batch)
      : "memory");
}

// Lets the copy engine bring a panel into L2 ahead of its load.
__device__ inline void prefetch_panel(const TensorMap& map, int column, int token, int head, int batch) {
  asm volatile("cp.async.bulk.prefetch.tensor.4d.L2.global.tile [%0, {%1, %2, %3, %4}];\n" ::"l"(
                   reinterpret_cast<uint64_t>(&map)),
               "r"(column), "r"(token), "r"(head), "r"(batch)
               : "memory");
}

// Barrier 1 to 15 of the block (0 is that of __syncthreads) among so many threads, whole warps: the first waits for all
// of them, the second counts this warp in and goes on.
__device__ inline void sync_threads(int barrier_id, int threads) {
  asm volatile("bar.sync %0, %1;\n" ::"r"(barrier_id), "r"(threads) : "memory");
}
__device__ inline void arrive_threads(int barrier_id, int threads) {
  asm volatile("bar.arrive %0, %1;\n" ::"r"(barrier_id), "r"(threads) : "memory");
}

// Every thread that wrote shared memory calls it, before the barrier behind which wgmma or the copy engine takes it up.
__device__ inline void fence_shared_for_async() { asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory"); }

// Registers per thread, for the calling warpgroup, which must call it as a whole: a multiple of 8 from 24 to 256. They
// come out of what the block was launched with, which __launch_bounds__(threads, 1) must fix: for all threads, rounded
// up to whole warpgroups, 65536 / threads rounded down to a multiple of 8. take_registers waits until others have
// released as many as it needs; it may not go down, release_registers not up.
template <int kRegisters>
__device__ inline void take_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ inline void release_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}

// The thread's lane, read anew: what is computed from it stays where it is used. Computed from threadIdx, the compiler
// may move it out of a loop, where it occupies registers all along.
__device__ inline int lane_index() {
  int lane;
  asm volatile("mov.u32 %0, %%laneid;\n" : "=r"(lane));
  return lane;
}

// The warp's index in the block. From a shuffle the compiler learns that all lanes have the same, and what is computed
// from it, addresses and descriptors, needs no vector registers; the whole warp must be there.
__device__ inline int warp_index() { return __shfl_sync(kFullWarp, static_cast<int>(threadIdx.x) / kWarpSize, 0); }

// The reverse of load_matrices(): lane 8·i + r gives the 16-byte-aligned address of row r of matrix i.
__device__ inline void store_matrices(void* row, const uint32_t (&registers)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};\n" ::"r"(shared_address(row)),
               "r"(registers[0]), "r"(registers[1]), "r"(registers[2]), "r"(registers[3])
               : "memory");
}
__device__ inline void store_matrices_transposed(void* row, const uint32_t (&registers)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};\n" ::"r"(shared_address(row)),
               "r"(registers[0]), "r"(registers[1]), "r"(registers[2]), "r"(registers[3])
               : "memory");
}

// The life of a product: fence_registers and wgmma_fence, one or more wgmma, wgmma_commit, wgmma_wait, fence_registers.
// From the first wgmma to the wait its accumulators and A registers belong to the tensor cores. fence_registers() is no
// instruction: it keeps the compiler from moving their uses into that time.
template <int kCells>
__device__ inline void fence_registers(float (&c)[kCells][4]) {
#pragma unroll
  for (int i = 0; i < kCells; ++i) {
    asm volatile("" : "+f"(c[i][0]), "+f"(c[i][1]), "+f"(c[i][2]), "+f"(c[i][3])::"memory");
  }
}
template <int kCount>
__device__ inline void fence_registers(uint32_t (&a)[kCount][4]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    asm volatile("" : "+r"(a[i][0]), "+r"(a[i][1]), "+r"(a[i][2]), "+r"(a[i][3])::"memory");
  }
}

// Orders what the warpgroup did to registers before the wgmma that follow; needed ahead of every group of them.
__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }

// Closes the group of this warp's wgmma since the last commit.
__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory"); }

// Waits until at most so many of this warp's latest groups are under way. It speaks for this warp alone: the other
// three of the warpgroup may still be reading the same shared memory.
template <int kPending>
__device__ inline void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kPending) : "memory");
}

// One instruction per number of columns, each with as many accumulators: HASTE_Ri are the operand numbers of the first
// i cells of 8 columns, HASTE_Ci the operands; X takes the numbers of the operands behind them.
#define HASTE_CELL(i) "+f"(c[i][0]), "+f"(c[i][1]), "+f"(c[i][2]), "+f"(c[i][3])
#define HASTE_C1 HASTE_CELL(0)
#define HASTE_R1 "%0, %1, %2, %3"
#define HASTE_C2 HASTE_C1, HASTE_CELL(1)
#define HASTE_R2 HASTE_R1 ", %4, %5, %6, %7"
#define HASTE_C3 HASTE_C2, HASTE_CELL(2)
#define HASTE_R3 HASTE_R2 ", %8, %9, %10, %11"
#define HASTE_C4 HASTE_C3, HASTE_CELL(3)
#define HASTE_R4 HASTE_R3 ", %12, %13, %14, %15"
#define HASTE_C5 HASTE_C4, HASTE_CELL(4)
#define HASTE_R5 HASTE_R4 ", %16, %17, %18, %19"
#define HASTE_C6 HASTE_C5, HASTE_CELL(5)
#define HASTE_R6 HASTE_R5 ", %20, %21, %22, %23"
#define HASTE_C7 HASTE_C6, HASTE_CELL(6)
#define HASTE_R7 HASTE_R6 ", %24, %25, %26, %27"
#define HASTE_C8 HASTE_C7, HASTE_CELL(7)
#define HASTE_R8 HASTE_R7 ", %28, %29, %30, %31"
#define HASTE_C9 HASTE_C8, HASTE_CELL(8)
#define HASTE_R9 HASTE_R8 ", %32, %33, %34, %35"
#define HASTE_C10 HASTE_C9, HASTE_CELL(9)
#define HASTE_R10 HASTE_R9 ", %36, %37, %38, %39"
#define HASTE_C11 HASTE_C10, HASTE_CELL(10)
#define HASTE_R11 HASTE_R10 ", %40, %41, %42, %43"
#define HASTE_C12 HASTE_C11, HASTE_CELL(11)
#define HASTE_R12 HASTE_R11 ", %44, %45, %46, %47"
#define HASTE_C13 HASTE_C12, HASTE_CELL(12)
#define HASTE_R13 HASTE_R12 ", %48, %49, %50, %51"
#define HASTE_C14 HASTE_C13, HASTE_CELL(13)
#define HASTE_R14 HASTE_R13 ", %52, %53, %54, %55"
#define HASTE_C15 HASTE_C14, HASTE_CELL(14)
#define HASTE_R15 HASTE_R14 ", %56, %57, %58, %59"
#define HASTE_C16 HASTE_C15, HASTE_CELL(15)
#define HASTE_R16 HASTE_R15 ", %60, %61, %62, %63"
#define HASTE_FOR_EACH_WIDTH(X, type)                            \
  X(type, 8, HASTE_R1, HASTE_C1, 4, 5, 6, 7, 8, 9, 10)           \
  X(type, 16, HASTE_R2, HASTE_C2, 8, 9, 10, 11, 12, 13, 14)      \
  X(type, 24, HASTE_R3, HASTE_C3, 12, 13, 14, 15, 16, 17, 18)    \
  X(type, 32, HASTE_R4, HASTE_C4, 16, 17, 18, 19, 20, 21, 22)    \
  X(type, 40, HASTE_R5, HASTE_C5, 20, 21, 22, 23, 24, 25, 26)    \
  X(type, 48, HASTE_R6, HASTE_C6, 24, 25, 26, 27, 28, 29, 30)    \
  X(type, 56, HASTE_R7, HASTE_C7, 28, 29, 30, 31, 32, 33, 34)    \
  X(type, 64, HASTE_R8, HASTE_C8, 32, 33, 34, 35, 36, 37, 38)    \
  X(type, 72, HASTE_R9, HASTE_C9, 36, 37, 38, 39, 40, 41, 42)    \
  X(type, 80, HASTE_R10, HASTE_C10, 40, 41, 42, 43, 44, 45, 46)  \
  X(type, 88, HASTE_R11, HASTE_C11, 44, 45, 46, 47, 48, 49, 50)  \
  X(type, 96, HASTE_R12, HASTE_C12, 48, 49, 50, 51, 52, 53, 54)  \
  X(type, 104, HASTE_R13, HASTE_C13, 52, 53, 54, 55, 56, 57, 58) \
  X(type, 112, HASTE_R14, HASTE_C14, 56, 57, 58, 59, 60, 61, 62) \
  X(type, 120, HASTE_R15, HASTE_C15, 60, 61, 62, 63, 64, 65, 66) \
  X(type, 128, HASTE_R16, HASTE_C16, 64, 65, 66, 67, 68, 69, 70)

// Operands: D, A, B, whether to add to D, the signs of A and B, whether each lies transposed (1: not along the
// contraction, "MN-major").
#define HASTE_WGMMA_SHARED(type, columns, registers, cells, a_, b_, add_, transpose_a_, transpose_b_, _1, _2)      \
  if constexpr (kColumns == columns) {                                                                             \
    asm volatile("{\n.reg .pred accumulate;\nsetp.ne.u32 accumulate, %" #add_                                      \
                 ", 0;\n"                                                                                          \
                 "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." type "." type " {" registers "}, %" #a_   \
                 ", %" #b_ ", accumulate, 1, 1, %" #transpose_a_ ", %" #transpose_b_ ";\n}\n"                      \
                 : cells                                                                                           \
                 : "l"(a), "l"(b), "r"(static_cast<unsigned>(add)), "n"(int{kTransposeA}), "n"(int{kTransposeB})); \
  }
#define HASTE_WGMMA_REGISTERS(type, columns, registers, cells, a0_, a1_, a2_, a3_, b_, add_, transpose_b_)         \
  if constexpr (kColumns == columns) {                                                                             \
    asm volatile("{\n.reg .pred accumulate;\nsetp.ne.u32 accumulate, %" #add_                                      \
                 ", 0;\n"                                                                                          \
                 "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." type "." type " {" registers "}, {%" #a0_ \
                 ", %" #a1_ ", %" #a2_ ", %" #a3_ "}, %" #b_ ", accumulate, 1, 1, %" #transpose_b_ ";\n}\n"        \
                 : cells                                                                                           \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<unsigned>(add)),            \
                   "n"(int{kTransposeB}));                                                                         \
  }

// c (+)= A·B, 64 × kColumns, over a contraction of 16; A and B in shared memory, by their descriptors.
template <typename T, int kColumns, bool kTransposeA, bool kTransposeB>
__device__ inline void wgmma(float (&c)[kColumns / 8][4], uint64_t a, uint64_t b, bool add) {
  static_assert(kColumns % 8 == 0 && kColumns >= 8 && kColumns <= 128);
  if constexpr (std::is_same_v<T, __half>) {
    HASTE_FOR_EACH_WIDTH(HASTE_WGMMA_SHARED, "f16")
  } else {
    static_assert(std::is_same_v<T, __nv_bfloat16>);
    HASTE_FOR_EACH_WIDTH(HASTE_WGMMA_SHARED, "bf16")
  }
}

// The same with A in registers.
template <typename T, int kColumns, bool kTransposeB>
__device__ inline void wgmma(float (&c)[kColumns / 8][4], const uint32_t (&a)[4], uint64_t b, bool add) {
  static_assert(kColumns % 8 == 0 && kColumns >= 8 && kColumns <= 128);
  if constexpr (std::is_same_v<T, __half>) {
    HASTE_FOR_EACH_WIDTH(HASTE_WGMMA_REGISTERS, "f16")
  } else {
    static_assert(std::is_same_v<T, __nv_bfloat16>);
    HASTE_FOR_EACH_WIDTH(HASTE_WGMMA_REGISTERS, "bf16")
  }
}

#endif  // HASTE_EMULATED

// Where element (row, column) of a panel lies, in bytes; 8 columns from a multiple of 8 on lie side by side.
__device__ constexpr unsigned panel_offset(unsigned row, unsigned column) {
  return row * kPanelRowBytes + (column / 8 ^ row % 8) * 16 + column % 8 * 2;
}

// A matrix descriptor: bits 0–13 the address, 16–29 the leading, 32–45 the stride byte offset, each in units of 16
// bytes; 49–51 the base offset, 0 as panels are aligned to 1024; 62–63 the swizzle, 1 = 128 bytes. An operand may begin
// inside of a panel: descriptors add as their addresses do, in units of 16 bytes.
__device__ inline uint64_t panel_descriptor(const void* start, unsigned leading_bytes, unsigned stride_bytes) {
  const uint64_t address = (shared_address(start) & 0x3ffffu) >> 4;
  return address | uint64_t{leading_bytes >> 4} << 16 | uint64_t{stride_bytes >> 4} << 32 | uint64_t{1} << 62;
}

// An operand whose contraction runs along the columns of panels ("K-major", not transposed); `start`: row 8·i of a
// panel, column 16·j. Stride: from 8 rows to the next 8. Leading: not used with a swizzle, 1 by convention.
__device__ inline uint64_t rows_descriptor(const void* start) {
  return panel_descriptor(start, 16, 8 * kPanelRowBytes);
}

// An operand whose contraction runs along the rows ("MN-major", transposed), its other dimension along the columns
// of one panel, then of the next, `panel_bytes` further on; `start`: row 16·i of a panel. Stride: from 8 rows (of the
// contraction) to the next 8. Leading: from 64 columns to the next 64; the number of columns may end within a panel.
__device__ inline uint64_t columns_descriptor(const void* start, unsigned panel_bytes) {
  return panel_descriptor(start, panel_bytes, 8 * kPanelRowBytes);
}

}  // namespace haste::cuda
