// The instruction sets: one source compiled once per vector width, the widest that the processor has chosen at run time.
#pragma once

#include <string>
#include <vector>

namespace haste::cpu {

enum class Isa : int { Portable, Avx2, Avx512, Avx512Bf16, Amx };

// Names as the user sees them: "portable", "avx2", "avx512", "avx512bf16", "amx".
const char* isa_name(Isa isa);

// Those that this binary holds and this processor can run, narrowest first.
std::vector<Isa> available_isas();

// The one in force: what force_isa or HASTE_CPU_CAPABILITY asked for, else the widest available.
Isa active_isa();

// Forces one by name for this process; "" goes back to the widest. Throws std::invalid_argument (one sentence that
// lists what there is) for one that is unknown or cannot run here.
void force_isa(const std::string& name);

}  // namespace haste::cpu
