// Which instruction set runs: what this binary holds, what processor and operating system support, what was asked for.
// HASTE_HAS_<ISA> comes from CMake, for those that the compiler could build.
#include "dispatch.h"

#include <atomic>
#include <cstdlib>
#include <iterator>
#include <stdexcept>

#include "isa/kernels.h"

#if defined(HASTE_HAS_AMX)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace haste::cpu {
namespace {

constexpr Isa kIsas[] = {Isa::Portable, Isa::Avx2, Isa::Avx512, Isa::Avx512Bf16, Isa::Amx};

#if defined(HASTE_HAS_AMX)
// Linux hands out the tile registers only to a process that asks, once for all its threads.
bool tiles_granted() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool granted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return granted;
}
#endif

// __builtin_cpu_supports looks at what the operating system saves and restores, too.
bool runs_here(Isa isa) {
  switch (isa) {
    case Isa::Portable: return true;
#if defined(HASTE_HAS_AVX2)
    case Isa::Avx2: return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
#if defined(HASTE_HAS_AVX512)
    case Isa::Avx512:
      return runs_here(Isa::Avx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
#if defined(HASTE_HAS_AVX512BF16)
    case Isa::Avx512Bf16: return runs_here(Isa::Avx512) && __builtin_cpu_supports("avx512bf16");
#endif
#if defined(HASTE_HAS_AMX)
    case Isa::Amx:
      return runs_here(Isa::Avx512Bf16) && __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
             tiles_granted();
#endif
    default: return false;
  }
}

Isa find_isa(const std::string& argument, const std::string& name) {
  std::string here;
  for (const Isa isa : available_isas()) {
    if (name == isa_name(isa)) return isa;
    here += (here.empty() ? "" : ", ") + std::string(isa_name(isa));
  }
  throw std::invalid_argument(argument + " must be one of " + here + " on this processor, got '" + name + "'");
}

Isa isa_from_environment() {
  const char* name = std::getenv("HASTE_CPU_CAPABILITY");
  return name && *name ? find_isa("HASTE_CPU_CAPABILITY", name) : available_isas().back();
}

constexpr int kUndecided = -1;
std::atomic<int> chosen{kUndecided};

#if defined(HASTE_HAS_AVX512)
[[maybe_unused]] Kernels with_bf16_products(const AttnAlignKernels& attn_align_loss) {
  Kernels kernels = avx512::kernels<float>();
  kernels.attn_align_loss = attn_align_loss;
  return kernels;
}
#endif

Kernels float_kernels(Isa isa) {
  switch (isa) {
#if defined(HASTE_HAS_AMX)
    case Isa::Amx: return with_bf16_products(amx::attn_align_loss<float>());
#endif
#if defined(HASTE_HAS_AVX512BF16)
    case Isa::Avx512Bf16: return with_bf16_products(avx512bf16::attn_align_loss<float>());
#endif
#if defined(HASTE_HAS_AVX512)
    case Isa::Avx512: return avx512::kernels<float>();
#endif
#if defined(HASTE_HAS_AVX2)
    case Isa::Avx2: return avx2::kernels<float>();
#endif
    default: return portable::kernels<float>();
  }
}

Kernels double_kernels(Isa isa) {
  switch (isa) {
#if defined(HASTE_HAS_AVX512)
    case Isa::Amx:
    case Isa::Avx512Bf16:
    case Isa::Avx512: return avx512::kernels<double>();
#endif
#if defined(HASTE_HAS_AVX2)
    case Isa::Avx2: return avx2::kernels<double>();
#endif
    default: return portable::kernels<double>();
  }
}

struct KernelTables {
  Kernels of_float[std::size(kIsas)], of_double[std::size(kIsas)];

  KernelTables() {
    for (const Isa isa : available_isas()) {
      of_float[int(isa)] = float_kernels(isa);
      of_double[int(isa)] = double_kernels(isa);
    }
  }
};

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::Portable: return "portable";
    case Isa::Avx2: return "avx2";
    case Isa::Avx512: return "avx512";
    case Isa::Avx512Bf16: return "avx512bf16";
    default: return "amx";
  }
}

std::vector<Isa> available_isas() {
  std::vector<Isa> isas;
  for (const Isa isa : kIsas) {
    if (runs_here(isa)) isas.push_back(isa);
  }
  return isas;
}

Isa active_isa() {
  if (chosen == kUndecided) chosen = int(isa_from_environment());
  return Isa(chosen.load());
}

void force_isa(const std::string& name) {
  chosen = int(name.empty() ? available_isas().back() : find_isa("the CPU capability", name));
}

const Kernels& active_kernels(bool in_double) {
  static const KernelTables tables;
  return (in_double ? tables.of_double : tables.of_float)[int(active_isa())];
}

}  // namespace haste::cpu
