#include "cpu/isa.h"

#if FORGE_ISA_LEVEL == 0

#include <cstdlib>
#include <cstring>

#include "check.h"

namespace forge {
namespace {

const char* const kNames[kIsaLevels] = {"portable", "avx2", "avx512", "avx512_bf16"};

int best_level_of_this_cpu() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq")) {
    return __builtin_cpu_supports("avx512bf16") ? 3 : 2;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
  return 0;
}

int choose_level() {
  const int best = best_level_of_this_cpu();
  const char* wanted = std::getenv("FORGE_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') return best;
  for (int level = 0; level < kIsaLevels; ++level) {
    if (std::strcmp(wanted, kNames[level]) != 0) continue;
    FORGE_CHECK(level <= best, "FORGE_CPU_ISA", wanted, "at most " << kNames[best] << ", the best that this CPU has");
    return level;
  }
  FORGE_CHECK(false, "FORGE_CPU_ISA", wanted, "portable, avx2, avx512 or avx512_bf16");
  return best;
}

}  // namespace

int active_isa_level() {
  static const int level = choose_level();
  return level;
}

}  // namespace forge

#endif
