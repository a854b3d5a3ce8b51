// Runs of elements of any dtype, seen in the dtype of the arithmetic.
#pragma once

#include "data.h"
#include "math.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace diffpp {
namespace DIFFPP_ISA {
namespace {

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

}  // namespace
}  // namespace DIFFPP_ISA
}  // namespace diffpp
