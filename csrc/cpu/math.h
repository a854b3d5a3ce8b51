// Scalar building blocks, written so that loops over them vectorise. Fused multiply-adds are explicit (the files are compiled
// with -ffp-contract=off), so that the body and the tail of a loop round alike.
#pragma once

#include <cstdint>
#include <cstring>

namespace diffpp {
namespace DIFFPP_ISA {
namespace {

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

// ln x for positive normal x, within 1 ulp: x = m 2^e with m in [sqrt(1/2), sqrt(2)), ln(1 + f) as f - f^2/2 + f^3 p(f) with
// the minimax polynomial p of the Cephes library, and ln 2 in two parts.
inline float log_normal(float x) {
  const uint32_t pattern = bits<uint32_t>(x);
  const int32_t exponent = static_cast<int32_t>(pattern - 0x3F3504F3u) >> 23;
  const float f = bits<float>(pattern - (static_cast<uint32_t>(exponent) << 23)) - 1.0f;
  const float e = static_cast<float>(exponent);
  float p = 7.0376836292e-2f;
  p = madd(p, f, -1.1514610310e-1f);
  p = madd(p, f, 1.1676998740e-1f);
  p = madd(p, f, -1.2420140846e-1f);
  p = madd(p, f, 1.4249322787e-1f);
  p = madd(p, f, -1.6668057665e-1f);
  p = madd(p, f, 2.0000714765e-1f);
  p = madd(p, f, -2.4999993993e-1f);
  p = madd(p, f, 3.3333331174e-1f);
  const float square = f * f;
  float y = madd(e, -2.12194440e-4f, p * f * square);
  y = madd(-0.5f, square, y);
  return madd(e, 0.693359375f, f + y);
}

// 1 / (1 + e^-y) within 2 ulp, but for y above 87 it is 1 and below -88.4 it is 0. For NaN it is 0 or 1: the product
// with y is NaN. e^-y = 2^n e^f with |f| <= ln(2)/2, ln 2 in two parts and a minimax polynomial for e^f.
inline float sigmoid(float y) {
  // Bounds beyond which 2^n is infinity or zero. Integers order floats of one sign, and their minimum is one
  // instruction.
  constexpr uint32_t below = 0xC2B20000u;  // -89
  constexpr int32_t above = 0x42B00000;    // 88
  const uint32_t raised = bits<uint32_t>(y) < below ? bits<uint32_t>(y) : below;
  const int32_t held = static_cast<int32_t>(raised) < above ? static_cast<int32_t>(raised) : above;
  y = bits<float>(held);
  // The sum rounds -y / ln 2 to n and holds n + 127, the biased exponent of 2^n, in its low bits.
  constexpr float rounder = 12582912.0f + 127.0f;
  const float sum = madd(y, -1.44269504088896341f, rounder);
  const float n = sum - rounder;
  const float power = bits<float>(bits<uint32_t>(sum) << 23);
  const float f = madd(n, 2.12194440e-4f, madd(n, -0.693359375f, -y));
  float p = 1.3814540070e-3f;
  p = madd(p, f, 8.3687451077e-3f);
  p = madd(p, f, 4.1668390786e-2f);
  p = madd(p, f, 1.6666520399e-1f);
  p = madd(p, f, 4.9999993432e-1f);
  p = madd(p, f, 1.0f);
  p = madd(p, f, 1.0f);
  return 1.0f / madd(p, power, 1.0f);
}

inline double sigmoid(double y) { return 1.0 / (1.0 + __builtin_exp(-y)); }

// cos(2 pi u) and sin(2 pi u) for u in [0, 1]: u is reduced exactly to an eighth of a turn around a quarter turn, where the
// minimax polynomials of the Cephes library hold.
inline void cos_sin_turns(float u, float& cosine, float& sine) {
  const float quarters = u * 4.0f;
  const float nearest = (quarters + 12582912.0f) - 12582912.0f;
  const int32_t quadrant = static_cast<int32_t>(nearest);
  const float f = (quarters - nearest) * 1.5707963267948966f;
  const float square = f * f;
  float s = madd(-1.9515295891e-4f, square, 8.3321608736e-3f);
  s = madd(s, square, -1.6666654611e-1f);
  s = madd(s * square, f, f);
  float c = madd(2.443315711809948e-5f, square, -1.388731625493765e-3f);
  c = madd(c, square, 4.166664568298827e-2f);
  c = madd(c, square * square, madd(-0.5f, square, 1.0f));
  const float along = quadrant & 1 ? s : c;
  const float across = quadrant & 1 ? c : s;
  cosine = (quadrant + 1) & 2 ? -along : along;
  sine = quadrant & 2 ? -across : across;
}

}  // namespace
}  // namespace DIFFPP_ISA
}  // namespace diffpp
