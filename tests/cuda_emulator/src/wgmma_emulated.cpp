// wgmma, by what its descriptors say and not by what a kernel meant: a wrong one gives wrong numbers. Each warp of a
// warpgroup computes its 16 rows for itself, when it commits a group or not before it waits for it, by the seed; until
// then its accumulators hold NaN, and A registers are read no sooner. What this sees: a missing wait, also of one warp
// on account of another; a missing wgmma_fence; registers that change under way; memory without fence_shared_for_async;
// descriptors that differ among the warps. What it cannot see: registers written between wgmma_fence and wgmma.
#include <deque>

#include "hopper_state.h"
#include "warp.h"

namespace emulation {
namespace {

constexpr int kRows = 16;   // of a warp
constexpr int kDepth = 16;  // the contraction
constexpr int kMostColumns = 128;

// What all threads of a warpgroup must agree on.
struct Instruction {
  uint64_t a, b;  // descriptors; a = 0 where A is in registers
  int columns;
  bool a_in_registers, transpose_a, transpose_b, add, bfloat16;
  bool operator==(const Instruction& o) const {
    return a == o.a && b == o.b && columns == o.columns && a_in_registers == o.a_in_registers &&
           transpose_a == o.transpose_a && transpose_b == o.transpose_b && add == o.add && bfloat16 == o.bfloat16;
  }
};

struct Lane {
  float* c;
  const uint32_t* a;
  uint32_t a_at_issue[4];
  std::vector<float> c_at_issue;
};

struct Product {
  Instruction instruction;
  bool continues;  // c is that of a product under way
  Lane lanes[32];
};

struct WarpState {
  bool fenced = false;
  std::vector<Product> open;
  std::deque<std::vector<Product>> groups;  // committed and not executed
  size_t issued = 0;
};

std::vector<WarpState> warps;
std::vector<std::vector<Instruction>> issued_by_warpgroup;

WarpState& state() { return warps[thread() / 32]; }

// --- descriptors ---

// Byte offset of element (i, k), i along M or N, before the swizzle: the canonical layouts of the PTX ISA for elements
// of 16 bits. `width`: 16-byte chunks in a row of the swizzle, 1 for none.
uint32_t offset_of(int i, int k, bool transposed, uint32_t width, uint32_t leading, uint32_t stride) {
  if (!transposed) {
    const uint32_t along = width == 1 ? k / 8 * leading + k % 8 * 2 : k * 2;
    return i % 8 * width * 16 + i / 8 * stride + along;
  }
  if (width == 1) return i % 8 * 2 + i / 8 * stride + k % 8 * 16 + k / 8 * leading;
  const int atom = static_cast<int>(width) * 8;
  return i % atom * 2 + i / atom * leading + k % 8 * width * 16 + k / 8 * stride;
}

uint16_t element_at(uint64_t descriptor, int i, int k, bool transposed) {
  constexpr uint32_t kWidths[] = {1, 8, 4, 2};
  const auto field = [&](int first) { return static_cast<uint32_t>(descriptor >> first & 0x3fff) * 16; };
  const uint32_t width = kWidths[descriptor >> 62];
  if ((descriptor >> 49 & 7) != 0) fail("base offsets of descriptors are not emulated");
  if ((descriptor & 0x3ff1'c000'c000'c000) != 0) fail("a descriptor has bits set that mean nothing");
  uint32_t address = field(0) + offset_of(i, k, transposed, width, field(16), field(32));
  address ^= (address >> 7 & (width - 1)) << 4;
  if (!is_fenced(address)) fail("wgmma reads what a thread stored without fence_shared_for_async");
  uint16_t bits;
  std::memcpy(&bits, at_shared_address(address), sizeof(bits));
  return bits;
}

// --- execution ---

float value(const Instruction& instruction, uint16_t bits) {
  return instruction.bfloat16 ? element<__nv_bfloat16>(bits) : element<__half>(bits);
}

void gather_a(const Product& product, int warp, float (&a)[kRows][kDepth]) {
  const Instruction& in = product.instruction;
  if (!in.a_in_registers) {
    for (int r = 0; r < kRows; ++r) {
      for (int k = 0; k < kDepth; ++k) a[r][k] = value(in, element_at(in.a, warp % 4 * kRows + r, k, in.transpose_a));
    }
    return;
  }
  for (int lane = 0; lane < 32; ++lane) {
    const Lane& from = product.lanes[lane];
    if (std::memcmp(from.a, from.a_at_issue, sizeof(from.a_at_issue)) != 0) {
      fail("the A registers of a wgmma changed before it was waited for");
    }
    for (int i = 0; i < 8; ++i) {  // register i / 2: rows lane / 4 (+ 8), columns 0–7 or 8–15
      const int row = lane / 4 + i / 2 % 2 * 8, k = i / 4 * 8 + lane % 4 * 2 + i % 2;
      a[row][k] = value(in, static_cast<uint16_t>(from.a[i / 2] >> i % 2 * 16));
    }
  }
}

bool untouched(const float* c, size_t count) {
  for (size_t i = 0; i < count; ++i) {
    if (__float_as_uint(c[i]) != 0xffffffffu) return false;
  }
  return true;
}

void execute(Product& product, int warp) {
  static float a[kRows][kDepth], b[kMostColumns][kDepth];
  const Instruction& in = product.instruction;
  gather_a(product, warp, a);
  for (int n = 0; n < in.columns; ++n) {
    for (int k = 0; k < kDepth; ++k) b[n][k] = value(in, element_at(in.b, n, k, in.transpose_b));
  }
  for (int lane = 0; lane < 32; ++lane) {
    Lane& to = product.lanes[lane];
    if (!product.continues) {
      if (!untouched(to.c, in.columns / 2)) fail("the accumulators of a wgmma changed before it was waited for");
      std::memcpy(to.c, to.c_at_issue.data(), in.columns / 2 * sizeof(float));
    }
    for (int i = 0; i < in.columns / 2; ++i) {
      const int row = lane / 4 + i % 4 / 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
      double sum = in.add ? to.c[i] : 0.;
      for (int k = 0; k < kDepth; ++k) sum += static_cast<double>(a[row][k]) * b[column][k];
      to.c[i] = truncated(sum);
    }
  }
}

void execute_oldest_group(int warp) {
  for (Product& product : warps[warp].groups.front()) execute(product, warp);
  warps[warp].groups.pop_front();
}

// --- issue ---

bool under_way(const WarpState& warp, const float* c) {
  const auto holds = [&](const std::vector<Product>& products) {
    return std::any_of(products.begin(), products.end(), [&](const Product& p) { return p.lanes[0].c == c; });
  };
  return holds(warp.open) || std::any_of(warp.groups.begin(), warp.groups.end(), holds);
}

struct Issue {
  Instruction instruction;
  float* c;
  const uint32_t* a;
};

void issue_of_warp(void* const* arguments) {
  WarpState& warp = state();
  const Instruction& in = at<Issue>(arguments, 0).instruction;
  if (!warp.fenced) fail("a group of wgmma begins without wgmma_fence");
  auto& issued = issued_by_warpgroup[thread() / 128];
  if (warp.issued == issued.size()) issued.push_back(in);
  if (!(issued[warp.issued++] == in)) fail("the warps of a warpgroup issue different wgmma");

  Product product{in, under_way(warp, at<Issue>(arguments, 0).c), {}};
  for (int i = 0; i < 32; ++i) {
    const Issue& from = at<Issue>(arguments, i);
    if (!(from.instruction == in)) fail("the lanes of a warp issue different wgmma");
    Lane& lane = product.lanes[i];
    lane.c = from.c;
    lane.a = from.a;
    if (from.a != nullptr) std::memcpy(lane.a_at_issue, from.a, sizeof(lane.a_at_issue));
    if (!product.continues) {
      lane.c_at_issue.assign(from.c, from.c + in.columns / 2);
      std::memset(from.c, 0xff, in.columns / 2 * sizeof(float));
    }
  }
  warp.open.push_back(std::move(product));
}

void issue(Issue argument) {
  if (device.major != 9 || device.minor != 0) fail("only a device of compute capability 9.0 has wgmma");
  const Instruction& in = argument.instruction;
  if (device.whole_panels && in.transpose_b && in.columns > 64 && in.columns % 64 != 0) {
    fail("wgmma takes columns of a transposed operand that end within its second panel");
  }
  if ((thread() / 128 + 1) * 128 > static_cast<int>(blockDim.x)) fail("wgmma needs a warpgroup of 4 whole warps");
  meet_warp(argument, issue_of_warp);
}

}  // namespace

void begin_wgmma(int threads) {
  warps.assign(threads / 32, WarpState{});
  issued_by_warpgroup.assign((threads + 127) / 128, {});
}

void end_wgmma() {
  for (size_t warp = 0; warp < warps.size(); ++warp) {
    if (!warps[warp].open.empty()) fail("a warp ends with wgmma that it has not committed");
    if (!warps[warp].groups.empty()) fail("a warp ends with wgmma that it has not waited for");
    if (warps[warp].issued != issued_by_warpgroup[warp / 4].size()) {
      fail("the warps of a warpgroup issue different wgmma");
    }
  }
}

}  // namespace emulation

namespace haste::cuda {

using namespace emulation;

void wgmma_fence() {
  meet_warp([](void* const*) { state().fenced = true; }, nullptr);
}

void wgmma_commit() {
  meet_warp(
      [](void* const*) {
        WarpState& warp = state();
        warp.groups.push_back(std::move(warp.open));
        warp.open.clear();
        warp.fenced = false;
        if (random_below(2) == 0) return;
        while (!warp.groups.empty()) execute_oldest_group(thread() / 32);
      },
      nullptr);
}

void wgmma_wait(int pending) {
  meet_warp(pending, [](void* const* arguments) {
    const auto under_way = static_cast<size_t>(at<int>(arguments, 0));
    while (state().groups.size() > under_way) execute_oldest_group(thread() / 32);
  });
}

template <typename T, int kColumns, bool kTransposeA, bool kTransposeB>
void wgmma(float (&c)[kColumns / 8][4], uint64_t a, uint64_t b, bool add) {
  constexpr bool kBfloat16 = std::is_same_v<T, __nv_bfloat16>;
  issue({{a, b, kColumns, false, kTransposeA, kTransposeB, add, kBfloat16}, c[0], nullptr});
}

template <typename T, int kColumns, bool kTransposeB>
void wgmma(float (&c)[kColumns / 8][4], const uint32_t (&a)[4], uint64_t b, bool add) {
  constexpr bool kBfloat16 = std::is_same_v<T, __nv_bfloat16>;
  issue({{0, b, kColumns, true, false, kTransposeB, add, kBfloat16}, c[0], a});
}

#define FOR_BOTH_B(T, n, B)                                                           \
  template void wgmma<T, n, false, B>(float (&)[n / 8][4], uint64_t, uint64_t, bool); \
  template void wgmma<T, n, true, B>(float (&)[n / 8][4], uint64_t, uint64_t, bool);  \
  template void wgmma<T, n, B>(float (&)[n / 8][4], const uint32_t (&)[4], uint64_t, bool);
#define FOR_TYPE(T, n) FOR_BOTH_B(T, n, false) FOR_BOTH_B(T, n, true)
#define FOR_WIDTH(n) FOR_TYPE(__half, n) FOR_TYPE(__nv_bfloat16, n)
FOR_WIDTH(8)
FOR_WIDTH(16)
FOR_WIDTH(24) FOR_WIDTH(32) FOR_WIDTH(40) FOR_WIDTH(48) FOR_WIDTH(56) FOR_WIDTH(64) FOR_WIDTH(72) FOR_WIDTH(80)
    FOR_WIDTH(88) FOR_WIDTH(96) FOR_WIDTH(104) FOR_WIDTH(112) FOR_WIDTH(120) FOR_WIDTH(128)

}  // namespace haste::cuda
