// The processor paths: one source compiled once per vector width, the widest that the processor has
// chosen at run time.
#pragma once

#include <string>
#include <vector>

namespace haste::cpu {

enum class Path : int { Portable, Avx2, Avx512, Avx512Bf16, Amx };

// Names as the user sees them: "portable", "avx2", "avx512", "avx512bf16", "amx".
const char* path_name(Path path);

// The paths that this binary holds and this processor can run, narrowest first.
std::vector<Path> available_paths();

// The path in force: what force_path or HASTE_CPU_PATH asked for, else the widest available.
Path active_path();

// Forces a path by name for this process; "" goes back to the widest. Throws std::invalid_argument
// (one sentence that lists what there is) for a path that is unknown or cannot run here.
void force_path(const std::string& name);

}  // namespace haste::cpu
