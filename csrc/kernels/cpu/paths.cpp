// Which processor path runs: what this binary holds, what processor and operating system support, what was asked for.
// HASTE_HAS_<PATH> comes from CMake, for the paths that the compiler could build.
#include "paths.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "isa/kernels.h"

#if defined(HASTE_HAS_AMX)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace haste::cpu {
namespace {

constexpr Path kPaths[] = {Path::Portable, Path::Avx2, Path::Avx512, Path::Avx512Bf16, Path::Amx};

#define HASTE_KERNELS_OF(isa)                                                                             \
  {                                                                                                       \
    isa::attn_align_loss_scratch, isa::attn_align_loss_forward, isa::attn_align_loss_backward,            \
        isa::token_cosine_loss_forward, isa::token_cosine_loss_backward, isa::taylor_extrapolate_scratch, \
        isa::taylor_extrapolate                                                                           \
  }

constexpr Kernels kPortable = HASTE_KERNELS_OF(portable);
#if defined(HASTE_HAS_AVX2)
constexpr Kernels kAvx2 = HASTE_KERNELS_OF(avx2);
#endif
#if defined(HASTE_HAS_AVX512)
constexpr Kernels kAvx512 = HASTE_KERNELS_OF(avx512);
#endif

// Products of bf16 serve the attention maps; the memory-bound operations are those of AVX-512.
#define HASTE_BF16_KERNELS_OF(isa)                                                             \
  {                                                                                            \
    isa::attn_align_loss_scratch, isa::attn_align_loss_forward, isa::attn_align_loss_backward, \
        avx512::token_cosine_loss_forward, avx512::token_cosine_loss_backward,                 \
        avx512::taylor_extrapolate_scratch, avx512::taylor_extrapolate                         \
  }

#if defined(HASTE_HAS_AVX512BF16)
constexpr Kernels kAvx512Bf16 = HASTE_BF16_KERNELS_OF(avx512bf16);
#endif
#if defined(HASTE_HAS_AMX)
constexpr Kernels kAmx = HASTE_BF16_KERNELS_OF(amx);

// Linux hands out the tile registers only to a process that asks, once for all its threads.
bool tiles_granted() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool granted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return granted;
}
#endif

// __builtin_cpu_supports looks at what the operating system saves and restores, too.
bool runs_here(Path path) {
  switch (path) {
    case Path::Portable: return true;
#if defined(HASTE_HAS_AVX2)
    case Path::Avx2: return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
#if defined(HASTE_HAS_AVX512)
    case Path::Avx512:
      return runs_here(Path::Avx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
#if defined(HASTE_HAS_AVX512BF16)
    case Path::Avx512Bf16: return runs_here(Path::Avx512) && __builtin_cpu_supports("avx512bf16");
#endif
#if defined(HASTE_HAS_AMX)
    case Path::Amx:
      return runs_here(Path::Avx512Bf16) && __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
             tiles_granted();
#endif
    default: return false;
  }
}

Path find_path(const std::string& argument, const std::string& name) {
  std::string here;
  for (const Path path : available_paths()) {
    if (name == path_name(path)) return path;
    here += (here.empty() ? "" : ", ") + std::string(path_name(path));
  }
  throw std::invalid_argument(argument + " is '" + name + "'; it must be one of the paths that can run here: " + here);
}

Path path_from_environment() {
  const char* name = std::getenv("HASTE_CPU_PATH");
  return name && *name ? find_path("HASTE_CPU_PATH", name) : available_paths().back();
}

constexpr int kUndecided = -1;
std::atomic<int> chosen{kUndecided};

}  // namespace

const char* path_name(Path path) {
  switch (path) {
    case Path::Portable: return "portable";
    case Path::Avx2: return "avx2";
    case Path::Avx512: return "avx512";
    case Path::Avx512Bf16: return "avx512bf16";
    default: return "amx";
  }
}

std::vector<Path> available_paths() {
  std::vector<Path> paths;
  for (const Path path : kPaths) {
    if (runs_here(path)) paths.push_back(path);
  }
  return paths;
}

Path active_path() {
  if (chosen == kUndecided) chosen = int(path_from_environment());
  return Path(chosen.load());
}

void force_path(const std::string& name) {
  chosen = int(name.empty() ? available_paths().back() : find_path("the CPU path", name));
}

const Kernels& active_kernels() {
  switch (active_path()) {
#if defined(HASTE_HAS_AMX)
    case Path::Amx: return kAmx;
#endif
#if defined(HASTE_HAS_AVX512BF16)
    case Path::Avx512Bf16: return kAvx512Bf16;
#endif
#if defined(HASTE_HAS_AVX512)
    case Path::Avx512: return kAvx512;
#endif
#if defined(HASTE_HAS_AVX2)
    case Path::Avx2: return kAvx2;
#endif
    default: return kPortable;
  }
}

}  // namespace haste::cpu
