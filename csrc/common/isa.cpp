#include "kernel.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

namespace diffpp {

namespace {

Isa best() {
#if defined(DIFFPP_X86)
  __builtin_cpu_init();
  // F16C comes with every processor that has AVX2.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return avx512 ? Isa::avx512 : avx2 ? Isa::avx2 : Isa::baseline;
#else
  return Isa::baseline;
#endif
}

Isa choose() {
  const Isa limit = best();
  const char* wanted = std::getenv("DIFFPP_FAST_ISA");
  if (wanted == nullptr || *wanted == '\0') return limit;
  for (Isa isa : {Isa::baseline, Isa::avx2, Isa::avx512})
    if (isa <= limit && std::strcmp(wanted, isa_name(isa)) == 0) return isa;
  std::fprintf(
      stderr, "diffpp_fast: DIFFPP_FAST_ISA=%s is not an instruction set that this processor and this build have; using %s\n",
      wanted, isa_name(limit));
  return limit;
}

}  // namespace

Isa isa() {
  static const Isa chosen = choose();
  return chosen;
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx512: return "avx512";
    case Isa::avx2: return "avx2";
    default: return "baseline";
  }
}

}  // namespace diffpp
