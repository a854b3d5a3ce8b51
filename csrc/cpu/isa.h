// One source, compiled once per instruction set.
//
// setup.py compiles every kernel file of this folder with -DDIFFPP_ISA=baseline, and on x86-64 also =avx2 and =avx512, each
// with the flags that go with it. A kernel lives in the namespace of that name; `choose` picks one when the process starts.
// Kernel files must define nothing with external linkage outside that namespace and use no templates or inline functions
// of the standard library: the linker keeps one copy of those, and it could be the one that this processor can't run.
#pragma once

#include <cstdint>

namespace diffpp {

enum class Isa { baseline, avx2, avx512 };

// What this processor can run and this build holds, unless DIFFPP_FAST_ISA names a lower one. Read once.
Isa isa();
const char* isa_name(Isa isa);

}  // namespace diffpp

// Declares `void name(const Arguments&, int64_t begin, int64_t end)`, which does the work items [begin, end), in every
// namespace, and `name##_kernel()`, which returns the one to call. To be used inside namespace diffpp.
#if defined(DIFFPP_X86)
#define DIFFPP_DECLARE_KERNEL(name, Arguments)                                                    \
  namespace baseline { void name(const Arguments&, int64_t begin, int64_t end); }                \
  namespace avx2 { void name(const Arguments&, int64_t begin, int64_t end); }                    \
  namespace avx512 { void name(const Arguments&, int64_t begin, int64_t end); }                  \
  inline auto name##_kernel() {                                                                  \
    return isa() == Isa::avx512 ? avx512::name : isa() == Isa::avx2 ? avx2::name : baseline::name; \
  }
#else
#define DIFFPP_DECLARE_KERNEL(name, Arguments)                                    \
  namespace baseline { void name(const Arguments&, int64_t begin, int64_t end); } \
  inline auto name##_kernel() { return baseline::name; }
#endif
