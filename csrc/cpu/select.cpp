// Chooses the kernels for the CPU that runs them.
#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace ceat_cpu {
namespace {

const Kernels& best() {
#ifdef CEAT_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  // A ceiling, for tests and comparisons: a set that this CPU lacks is never chosen.
  const char* ceiling = std::getenv("CEAT_FAST_CPU_ISA");
  const auto named = [&](const char* name) { return ceiling != nullptr && std::strcmp(ceiling, name) == 0; };
  const bool highest = ceiling == nullptr || named("avx512_bf16");
  if (bf16 && highest) return kernels_avx512_bf16;
  if (avx512 && (highest || named("avx512"))) return kernels_avx512;
  if (avx2 && (highest || named("avx512") || named("avx2"))) return kernels_avx2;
#endif
  return kernels_portable;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = best();
  return chosen;
}

}  // namespace ceat_cpu

extern "C" __attribute__((visibility("default"))) const char* ceat_fast_cpu_isa() { return ceat_cpu::kernels().name; }
