// The terms that kernels and their callers share: tensors as plain structs, and how a kernel is called.
//
// A folder csrc/<operator> holds arguments.h (what its kernels take), cpu.cpp, cuda.cu where GPUs are served, and binding.cpp
// (schemas, checks, allocation). A kernel does its whole work in one call; how it cuts the work is its own affair.
#pragma once

#include <cstdint>

namespace diffpp {

enum class Dtype : int32_t { float32, bfloat16, float16, float64 };

// A [B] tensor; no data where an optional one was not given.
struct PerSample {
  const void* data = nullptr;
  Dtype dtype = Dtype::float32;
  int64_t stride = 0;
};

// A dense [B, ...] tensor in one of two orders. Row-major: channels = 1. channels_last: sample[c][p] is at p * channels + c.
struct Layout {
  int64_t batch;
  int64_t channels;
  int64_t pixels;

  constexpr int64_t sample() const { return channels * pixels; }
};

// The noise of a batch: stored as a tensor laid out like the data, or an address (see docs/randomness.md).
struct Noise {
  const void* stored = nullptr;
  const int64_t* samples = nullptr;
  uint64_t seed = 0;
  uint32_t stream = 0;
  // Of the generator's rounds, from the seed. Made before a launch, they are constants that cost GPUs no instruction.
  uint32_t keys[10][2] = {};

  static Noise drawn(const int64_t* samples, uint64_t seed, uint32_t stream) {
    Noise noise{nullptr, samples, seed, stream};
    for (uint32_t round = 0; round < 10; ++round) {
      noise.keys[round][0] = static_cast<uint32_t>(seed) + round * 0x9E3779B9u;
      noise.keys[round][1] = static_cast<uint32_t>(seed >> 32) + round * 0xBB67AE85u;
    }
    return noise;
  }
};

// In the order of PREDICTION_TYPES in the Python package.
enum class Prediction : int32_t { epsilon, v_prediction, flow_prediction, sample };

// The target o* of a prediction type: eps, alpha eps - sigma x0, eps - x0 or x0. What it does not hold is never read.
struct Target {
  Prediction prediction = Prediction::epsilon;
  const void* x0 = nullptr;
  Noise noise;
  PerSample alpha;
  PerSample sigma;

  static constexpr bool holds_x0(Prediction prediction) { return prediction != Prediction::epsilon; }
  static constexpr bool holds_noise(Prediction prediction) { return prediction != Prediction::sample; }
};

// Three network outputs [B, ...] at (x_t, t). guided = uncond + guidance_scale (cond - uncond), or cond where there is no
// uncond; d = guided - fake, r = guided - target.
struct Outputs {
  const void* fake;
  const void* cond;
  const void* uncond;
  double guidance_scale;
  Dtype dtype;  // of these, x0 and stored noise
  Layout layout;
  bool has_target;
  Target target;
};

// mean|r| as a divisor is at least this: MEAN_ABS_FLOOR in the Python package.
constexpr double kMeanAbsFloor = 1e-6;

// Elements that kernels for the CPU work on at a time, whole pixels: the most channels that channels_last may have there.
constexpr int64_t kChunk = 2048;

// Threads that share the work items of a kernel on the CPU.
struct Pool {
  using Work = void (*)(int64_t begin, int64_t end, void* context);

  int64_t (*threads)();
  // Calls work(begin, end, context) for ranges that make up [0, items); a second thread is worth waking for `grain` of them.
  void (*run)(int64_t items, int64_t grain, Work work, void* context);
};

// Instruction sets that a kernel for the CPU is compiled for, from the same source.
enum class Isa { baseline, avx2, avx512 };

// The best that this processor runs and this build holds, unless DIFFPP_FAST_ISA names a lower one. Read once.
Isa isa();
const char* isa_name(Isa isa);

}  // namespace diffpp

// Declares a kernel of csrc/<operator>/cpu.cpp, `void name(const Arguments&, const Pool&)`, in the namespace of each
// instruction set, and cpu::name, which calls the one for this processor. To be used inside the operator's namespace.
#if defined(DIFFPP_X86)
#define DIFFPP_CPU_KERNEL(name, Arguments)                                                             \
  namespace baseline { void name(const Arguments&, const Pool&); }                                    \
  namespace avx2 { void name(const Arguments&, const Pool&); }                                        \
  namespace avx512 { void name(const Arguments&, const Pool&); }                                      \
  namespace cpu {                                                                                      \
  inline void name(const Arguments& arguments, const Pool& pool) {                                    \
    switch (isa()) {                                                                                   \
      case Isa::avx512: return avx512::name(arguments, pool);                                          \
      case Isa::avx2: return avx2::name(arguments, pool);                                              \
      default: return baseline::name(arguments, pool);                                                 \
    }                                                                                                  \
  }                                                                                                    \
  }
#else
#define DIFFPP_CPU_KERNEL(name, Arguments)                                                                     \
  namespace baseline { void name(const Arguments&, const Pool&); }                                            \
  namespace cpu {                                                                                              \
  inline void name(const Arguments& arguments, const Pool& pool) { baseline::name(arguments, pool); }         \
  }
#endif
