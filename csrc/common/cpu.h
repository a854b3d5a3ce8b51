// The ground of the kernels for the CPU: scalars and runs of elements of any dtype, chunks of samples, threads, memory.
//
// setup.py compiles every csrc/<operator>/cpu.cpp with -DDIFFPP_ISA=baseline, and on x86-64 also =avx2 and =avx512, each with
// the flags that go with it. Such a file must define nothing with external linkage outside the namespace of that name and use
// no templates or inline functions of the standard library: the linker keeps one copy of those, and it could be the one that
// this processor can't run. What is here is in an anonymous namespace for the same reason.
#pragma once

#include <cstdint>
#include <cstring>
#include <new>

#include "kernel.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace diffpp {
namespace {

// Scalars, written so that loops over them vectorise. Fused multiply-adds are explicit (the files are compiled with
// -ffp-contract=off), so that the body and the tail of a loop round alike.

// a b + c
inline float madd(float a, float b, float c) {
#if defined(__FMA__) || defined(__aarch64__)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

inline double madd(double a, double b, double c) {
#if defined(__FMA__) || defined(__aarch64__)
  return __builtin_fma(a, b, c);
#else
  return a * b + c;
#endif
}

inline float root(float x) { return __builtin_sqrtf(x); }
inline double root(double x) { return __builtin_sqrt(x); }

inline float magnitude(float x) { return __builtin_fabsf(x); }
inline double magnitude(double x) { return __builtin_fabs(x); }

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

template <typename To, typename From>
inline To bits(From value) {
  static_assert(sizeof(To) == sizeof(From), "a bit pattern keeps its size");
  To result;
  std::memcpy(&result, &value, sizeof(To));
  return result;
}

// e^z = power * rest: power = 2^n with n in [-126, 128], where 2^128 is infinity, and rest = e^f with |f| <= ln(2)/2.
struct Exponential {
  float power;
  float rest;
};

// e^z with ln 2 in two parts and a minimax polynomial for e^f, for z from -87 to 89.
inline Exponential exponential(float z) {
  // The sum rounds z / ln 2 to n and holds n + 127, the biased exponent of 2^n, in its low bits.
  constexpr float rounder = 12582912.0f + 127.0f;
  const float sum = madd(z, 1.44269504088896341f, rounder);
  const float n = sum - rounder;
  const float power = bits<float>(bits<uint32_t>(sum) << 23);
  const float f = madd(n, 2.12194440e-4f, madd(n, -0.693359375f, z));
  float p = 1.3814540070e-3f;
  p = madd(p, f, 8.3687451077e-3f);
  p = madd(p, f, 4.1668390786e-2f);
  p = madd(p, f, 1.6666520399e-1f);
  p = madd(p, f, 4.9999993432e-1f);
  p = madd(p, f, 1.0f);
  return {power, madd(p, f, 1.0f)};
}

// 1 / (1 + e^-y) within 2 ulp, but for y above 87 it is 1 and below -88.4 it is 0. For NaN it is 0 or 1: the product
// with y is NaN.
inline float sigmoid(float y) {
  // Bounds beyond which 2^n is infinity or zero. Integers order floats of one sign, and their minimum is one
  // instruction.
  constexpr uint32_t below = 0xC2B20000u;  // -89
  constexpr int32_t above = 0x42B00000;    // 88
  const uint32_t raised = bits<uint32_t>(y) < below ? bits<uint32_t>(y) : below;
  const int32_t held = static_cast<int32_t>(raised) < above ? static_cast<int32_t>(raised) : above;
  const Exponential e = exponential(-bits<float>(held));
  return 1.0f / madd(e.rest, e.power, 1.0f);
}

inline double sigmoid(double y) { return 1.0 / (1.0 + __builtin_exp(-y)); }

// Runs of elements

// An element of a bfloat16 array, for loops that convert as they go.
struct Bfloat16 {
  uint16_t pattern;
};

// Whether an array of this dtype can be read as float, double or Bfloat16 without conversion.
template <typename T>
constexpr bool holds(Dtype dtype) {
  return dtype == (sizeof(T) == sizeof(float)    ? Dtype::float32
                   : sizeof(T) == sizeof(double) ? Dtype::float64
                                                 : Dtype::bfloat16);
}

inline float from_bfloat16(uint16_t pattern) { return bits<float>(static_cast<uint32_t>(pattern) << 16); }

// To nearest, ties to even; NaN stays NaN.
inline uint16_t to_bfloat16(float value) {
  const uint32_t pattern = bits<uint32_t>(value);
  const uint32_t rounded = (pattern + 0x7FFFu + ((pattern >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>(value == value ? rounded : 0x7FC0u);
}

#if !defined(__F16C__)
inline float from_float16(uint16_t pattern) {
  const uint32_t sign = static_cast<uint32_t>(pattern & 0x8000u) << 16;
  const uint32_t rest = pattern & 0x7FFFu;
  // Scaling by 2^112 moves float16's exponent to float32's and makes subnormals normal.
  const float finite = bits<float>(rest << 13) * 0x1p112f;
  const uint32_t magnitude = rest >= 0x7C00u ? (0x7F800000u | (rest << 13)) : bits<uint32_t>(finite);
  return bits<float>(sign | magnitude);
}

inline uint16_t to_float16(float value) {
  const uint32_t pattern = bits<uint32_t>(value);
  const uint32_t sign = (pattern >> 16) & 0x8000u;
  const uint32_t rest = pattern & 0x7FFFFFFFu;
  uint32_t result;
  if (rest > 0x7F800000u) {
    result = 0x7E00u;
  } else if (rest >= 0x477FF000u) {
    result = 0x7C00u;
  } else if (rest < 0x38800000u) {
    // The sum with 0.5 rounds at float16's smallest step, 2^-24, and leaves the steps in the low bits.
    result = bits<uint32_t>(bits<float>(rest) + 0.5f) - 0x3F000000u;
  } else {
    result = (rest - 0x38000000u + 0xFFFu + ((rest >> 13) & 1u)) >> 13;
  }
  return static_cast<uint16_t>(sign | result);
}
#endif

inline void convert(const uint16_t* from, Dtype dtype, float* to, int64_t n) {
  if (dtype == Dtype::bfloat16) {
    for (int64_t i = 0; i < n; ++i) to[i] = from_bfloat16(from[i]);
    return;
  }
#if defined(__F16C__)
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
  for (; i < n; ++i) to[i] = _cvtsh_ss(from[i]);
#else
  for (int64_t i = 0; i < n; ++i) to[i] = from_float16(from[i]);
#endif
}

inline void convert(const float* from, uint16_t* to, Dtype dtype, int64_t n) {
  if (dtype == Dtype::bfloat16) {
    for (int64_t i = 0; i < n; ++i) to[i] = to_bfloat16(from[i]);
    return;
  }
#if defined(__F16C__)
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), 0));
  for (; i < n; ++i) to[i] = _cvtss_sh(from[i], 0);
#else
  for (int64_t i = 0; i < n; ++i) to[i] = to_float16(from[i]);
#endif
}

// An element in the dtype of the arithmetic, and back.
inline float widen(float value) { return value; }
inline double widen(double value) { return value; }
inline float widen(Bfloat16 value) { return from_bfloat16(value.pattern); }

inline void narrow(float value, float& to) { to = value; }
inline void narrow(double value, double& to) { to = value; }
inline void narrow(float value, Bfloat16& to) { to.pattern = to_bfloat16(value); }

template <typename E>
using Wide = decltype(widen(E{}));

// Calls `work` with an element of the type in which a kernel reads arrays of this dtype. float16 is read as float, from
// the scratch of `load`: compilers do not vectorise its conversion.
template <typename Work>
inline void by_elements(Dtype dtype, const Work& work) {
  switch (dtype) {
    case Dtype::bfloat16: return work(Bfloat16{});
    case Dtype::float64: return work(double{});
    default: return work(float{});
  }
}

// The elements [offset, offset + n) of an array as T: the array itself where it holds T, else converted into `scratch`.
// T is float for float32, bfloat16 and float16 and double for float64; or Bfloat16 for bfloat16.
template <typename T>
inline const T* load(const void* array, Dtype dtype, int64_t offset, int64_t n, T* scratch) {
  if (holds<T>(dtype)) return static_cast<const T*>(array) + offset;
  if constexpr (sizeof(T) == sizeof(float))
    convert(static_cast<const uint16_t*>(array) + offset, dtype, scratch, n);
  return scratch;
}

// Where to write the elements [offset, ...) of an array: in place where it holds T, else to `scratch`; `store` completes it.
template <typename T>
inline T* destination(void* array, Dtype dtype, int64_t offset, T* scratch) {
  return holds<T>(dtype) ? static_cast<T*>(array) + offset : scratch;
}

template <typename T>
inline void store(const T* values, void* array, Dtype dtype, int64_t offset, int64_t n) {
  if constexpr (sizeof(T) == sizeof(float))
    if (!holds<T>(dtype)) convert(values, static_cast<uint16_t*>(array) + offset, dtype, n);
}

// One of the numbers of a [B] tensor, or `otherwise` where there is none.
template <typename T>
inline T number(const PerSample& values, int64_t b, T otherwise = T(0)) {
  if (values.data == nullptr) return otherwise;
  const int64_t i = b * values.stride;
  switch (values.dtype) {
    case Dtype::float32: return static_cast<T>(static_cast<const float*>(values.data)[i]);
    case Dtype::float64: return static_cast<T>(static_cast<const double*>(values.data)[i]);
    default: {
      float value;
      convert(static_cast<const uint16_t*>(values.data) + i, values.dtype, &value, 1);
      return static_cast<T>(value);
    }
  }
}

// One number to a [B] statistic in the dtype of the arithmetic on `dtype`.
inline void put(void* values, Dtype dtype, int64_t b, double value) {
  if (dtype == Dtype::float64) {
    static_cast<double*>(values)[b] = value;
  } else {
    static_cast<float*>(values)[b] = static_cast<float>(value);
  }
}

// Terms that are added up in the dtype of the arithmetic before the sum goes on in double: longer sums of float32 would
// lose precision where vectors are narrow.
constexpr int64_t kSumRun = 512;

// Samples are cut into chunks of whole pixels, the same for any number of threads. Chunks are the work items, and the unit of
// every reduction's first stage. Eight chunks of float32 fit in a first-level cache.
struct Chunk {
  int64_t b;       // the sample
  int64_t first;   // of its elements, in memory order
  int64_t n;       // elements
  int64_t offset;  // of `first` from the start of the tensor
};

struct Chunks {
  int64_t sample;      // elements of a sample
  int64_t length;      // elements of a chunk; the last of a sample may be shorter
  int64_t per_sample;  // chunks of a sample
  int64_t count;       // chunks of the batch

  explicit constexpr Chunks(const Layout& layout)
      : sample(layout.sample()),
        length(kChunk / layout.channels * layout.channels),
        per_sample((sample + length - 1) / length),
        count(layout.batch * per_sample) {}

  constexpr Chunk operator[](int64_t item) const {
    const int64_t b = item / per_sample;
    const int64_t first = item % per_sample * length;
    const int64_t n = sample - first < length ? sample - first : length;
    return {b, first, n, b * sample + first};
  }
};

// Chunks of a thread: fewer take less time than a second thread takes to wake up.
constexpr int64_t kChunksPerThread = 8;

// Shares out the work items [0, items) of a stage among threads, at least `grain` of them each.
template <typename Arguments>
inline void run(
    const Pool& pool, void (*stage)(const Arguments&, int64_t, int64_t), const Arguments& arguments, int64_t items,
    int64_t grain) {
  struct Call {
    void (*stage)(const Arguments&, int64_t, int64_t);
    const Arguments& arguments;
  } call{stage, arguments};
  pool.run(
      items, grain,
      [](int64_t begin, int64_t end, void* context) {
        const Call& call = *static_cast<const Call*>(context);
        call.stage(call.arguments, begin, end);
      },
      &call);
}

// Uninitialised memory for one call. A little of it is on the stack: an allocation costs as much as the work on a small tensor.
class Memory {
 public:
  explicit Memory(int64_t bytes)
      : data_(bytes > kSmall ? static_cast<char*>(::operator new(static_cast<size_t>(bytes), kAlignment)) : small_) {}
  ~Memory() {
    if (data_ != small_) ::operator delete(data_, kAlignment);
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  void* at(int64_t byte) const { return data_ + byte; }
  double* doubles() const { return static_cast<double*>(at(0)); }

 private:
  static constexpr int64_t kSmall = 8192;
  static constexpr auto kAlignment = std::align_val_t(64);
  alignas(64) char small_[kSmall];
  char* data_;
};

}  // namespace
}  // namespace diffpp
