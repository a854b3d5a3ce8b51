// How csrc was built: what `diffpp-fast doctor` asks of the library, a line for each fact. Only csrc/compilation.py tells.
#if defined(DIFFPP_FLAGS)
#include "kernel.h"

#include <string>

extern "C" __attribute__((visibility("default"))) const char* diffpp_fast_facts() {
#if defined(__clang__)
  static const char* compiler = "clang " __clang_version__;
#else
  static const char* compiler = "gcc " __VERSION__;
#endif
  static const std::string facts = std::string("compiler\t") + compiler +
      "\nflags\t" DIFFPP_FLAGS "\nbuilt for\t" DIFFPP_ISAS "\nGPU kernels\t" DIFFPP_CUDA_ARCHS
      "\nCUDA\t" DIFFPP_CUDA_RELEASE "\nrunning on\t" + diffpp::isa_name(diffpp::isa());
  return facts.c_str();
}
#endif
