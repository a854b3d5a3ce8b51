// Addressed noise, and what the losses compute with it: targets, d = guided - fake and r = guided - target, a chunk at a time.
//
// Noise is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011) and Box-Muller. Element i of a
// sample, in logical row-major order, is lane i % 4 of the block with counter (i / 4, stream, sample low, sample high) and key
// (seed low, seed high). See docs/randomness.md.
#pragma once

#include "cpu.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace diffpp {
namespace {

// Numbers are made in units of 16 blocks of 4, and up to 4 units at a time.
constexpr int64_t kUnit = 64;
constexpr int64_t kMostUnits = 4;

// Eight 32-bit words, each in a 64-bit lane whose upper half is of no account: a lane holds both halves of a product.
typedef uint64_t Words __attribute__((vector_size(64)));

inline void multiply(Words& words, uint32_t by) {
#if defined(__AVX512F__)
  words = reinterpret_cast<Words>(_mm512_mul_epu32(reinterpret_cast<__m512i>(words), _mm512_set1_epi64(by)));
#elif defined(__AVX2__)
  __m256i* halves = reinterpret_cast<__m256i*>(&words);
  const __m256i factor = _mm256_set1_epi64x(by);
  for (int half = 0; half < 2; ++half) halves[half] = _mm256_mul_epu32(halves[half], factor);
#elif defined(__SSE2__)
  __m128i* quarters = reinterpret_cast<__m128i*>(&words);
  const __m128i factor = _mm_set1_epi64x(by);
  for (int quarter = 0; quarter < 4; ++quarter) quarters[quarter] = _mm_mul_epu32(quarters[quarter], factor);
#else
  words = (words & 0xFFFFFFFFu) * static_cast<uint64_t>(by);
#endif
}

inline void keep_low(const Words& words, uint32_t* to) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi64_epi32(reinterpret_cast<__m512i>(words)));
#else
  for (int l = 0; l < 8; ++l) to[l] = static_cast<uint32_t>(words[l]);
#endif
}

struct Lanes {
  alignas(64) uint32_t words[4][kMostUnits * kUnit / 4];  // [lane][block]
};

struct RoundKeys {
  uint64_t words[10][2];

  explicit RoundKeys(uint64_t seed) {
    for (uint32_t round = 0; round < 10; ++round) {
      words[round][0] = static_cast<uint32_t>(seed) + round * 0x9E3779B9u;
      words[round][1] = static_cast<uint32_t>(seed >> 32) + round * 0xBB67AE85u;
    }
  }
};

inline void philox_round(Words& c0, Words& c1, Words& c2, Words& c3, const uint64_t* keys) {
  multiply(c0, 0xD2511F53u);
  multiply(c2, 0xCD9E8D57u);
  const Words p0 = c0;
  c0 = (c2 >> 32) ^ c1 ^ keys[0];
  c1 = c2;
  c2 = (p0 >> 32) ^ c3 ^ keys[1];
  c3 = p0;
}

// The words of the blocks [first, first + 16 units).
//
// This function and the next two stay out of line: inlined into their callers, gcc 12 makes code of them that takes half
// as long again.
__attribute__((noinline)) void philox(
    uint64_t first, int64_t units, uint32_t stream, uint64_t sample, uint64_t seed, Lanes& lanes) {
  const RoundKeys keys(seed);
  const Words index = Words{0, 1, 2, 3, 4, 5, 6, 7} + first;
  const Words c1_start = Words{} + stream;
  const Words c2_start = Words{} + (sample & 0xFFFFFFFFu);
  const Words c3_start = Words{} + (sample >> 32);
#if defined(__AVX512F__)
  // Two sets of eight blocks hide each other's latency; other processors have too few registers for two.
  for (int64_t block = 0; block < 16 * units; block += 16) {
    Words c0 = index + static_cast<uint64_t>(block), c1 = c1_start, c2 = c2_start, c3 = c3_start;
    Words d0 = c0 + 8, d1 = c1, d2 = c2, d3 = c3;
    for (int round = 0; round < 10; ++round) {
      philox_round(c0, c1, c2, c3, keys.words[round]);
      philox_round(d0, d1, d2, d3, keys.words[round]);
    }
    const Words c[4] = {c0, c1, c2, c3}, d[4] = {d0, d1, d2, d3};
    for (int lane = 0; lane < 4; ++lane) {
      keep_low(c[lane], lanes.words[lane] + block);
      keep_low(d[lane], lanes.words[lane] + block + 8);
    }
  }
#else
  for (int64_t block = 0; block < 16 * units; block += 8) {
    Words c0 = index + static_cast<uint64_t>(block), c1 = c1_start, c2 = c2_start, c3 = c3_start;
    for (int round = 0; round < 10; ++round) philox_round(c0, c1, c2, c3, keys.words[round]);
    keep_low(c0, lanes.words[0] + block);
    keep_low(c1, lanes.words[1] + block);
    keep_low(c2, lanes.words[2] + block);
    keep_low(c3, lanes.words[3] + block);
  }
#endif
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

// Box-Muller on n pairs of words.
__attribute__((noinline)) void box_muller(
    const uint32_t* first, const uint32_t* second, int64_t n, float* __restrict cosines, float* __restrict sines) {
  for (int64_t i = 0; i < n; ++i) {
    const float u1 = static_cast<float>(first[i]) * 0x1p-32f + 0x1p-33f;
    const float u2 = static_cast<float>(second[i]) * 0x1p-32f;
    const float radius = root(-2.0f * log_normal(u1));
    float cosine, sine;
    cos_sin_turns(u2, cosine, sine);
    cosines[i] = radius * cosine;
    sines[i] = radius * sine;
  }
}

// The normals of n blocks in the order of elements.
__attribute__((noinline)) void weave(
    const float (*values)[kMostUnits * kUnit / 4], int64_t n, float* __restrict to) {
  for (int64_t block = 0; block < n; ++block)
    for (int lane = 0; lane < 4; ++lane) to[4 * block + lane] = values[lane][block];
}

// The normals of the elements [first, first + units kUnit) of a sample; first is a multiple of kUnit.
inline void normals(uint64_t first, int64_t units, const Noise& noise, uint64_t sample, float* to) {
  Lanes lanes;
  alignas(64) float values[4][kMostUnits * kUnit / 4];
  const int64_t blocks = units * kUnit / 4;
  philox(first / 4, units, noise.stream, sample, noise.seed, lanes);
  box_muller(lanes.words[0], lanes.words[1], blocks, values[0], values[1]);
  box_muller(lanes.words[2], lanes.words[3], blocks, values[2], values[3]);
  weave(values, blocks, to);
}

// The normals of the elements [first, first + n) of a sample, any first.
inline void normal_run(int64_t first, int64_t n, const Noise& noise, uint64_t sample, float* to) {
  alignas(64) float buffer[kMostUnits * kUnit];
  const int64_t end = first + n;
  for (int64_t i = first; i < end;) {
    const int64_t aligned = i & ~(kUnit - 1);
    const int64_t units = smaller(kMostUnits, (end - aligned + kUnit - 1) / kUnit);
    const int64_t stop = smaller(end, aligned + units * kUnit);
    const bool whole = i == aligned && stop == aligned + units * kUnit;
    normals(aligned, units, noise, sample, whole ? to : buffer);
    if (!whole) std::memcpy(to, buffer + (i - aligned), static_cast<size_t>(stop - i) * sizeof(float));
    to += stop - i;
    i = stop;
  }
}

// The normals of n elements of a sample from `begin` on, counted in memory order; both are multiples of layout.channels.
inline void normals_in_memory_order(
    int64_t begin, int64_t n, const Layout& layout, const Noise& noise, uint64_t sample, float* to) {
  if (layout.channels == 1) {
    normal_run(begin, n, noise, sample, to);
    return;
  }
  alignas(64) float plane[kChunk];
  const int64_t pixel = begin / layout.channels;
  const int64_t count = n / layout.channels;
  for (int64_t c = 0; c < layout.channels; ++c) {
    normal_run(c * layout.pixels + pixel, count, noise, sample, plane);
    for (int64_t p = 0; p < count; ++p) to[p * layout.channels + c] = plane[p];
  }
}

// The noise of n elements of sample b from `begin` on, in memory order and in the dtype of the arithmetic: stored noise is
// converted, an address is drawn from. `scratch` holds kChunk elements.
template <typename T>
inline const T* noise_run(
    const Noise& noise, const Layout& layout, Dtype dtype, int64_t b, int64_t begin, int64_t n, T* scratch) {
  if (noise.stored != nullptr) return load(noise.stored, dtype, b * layout.sample() + begin, n, scratch);
  const uint64_t sample = static_cast<uint64_t>(noise.samples[b]);
  if constexpr (sizeof(T) == sizeof(float)) {
    normals_in_memory_order(begin, n, layout, noise, sample, scratch);
  } else {
    alignas(64) float drawn[kChunk];
    normals_in_memory_order(begin, n, layout, noise, sample, drawn);
    for (int64_t i = 0; i < n; ++i) scratch[i] = static_cast<T>(drawn[i]);
  }
  return scratch;
}

// Targets and gaps

// The target of a chunk, in `noise_scratch` or where the data is; `x0_scratch` is free again. Each holds kChunk.
template <typename T>
inline const T* target_run(
    const Target& a, Dtype dtype, const Layout& layout, const Chunk& chunk, T* x0_scratch, T* noise_scratch) {
  const auto [b, first, n, offset] = chunk;
  if (a.prediction == Prediction::sample) return load(a.x0, dtype, offset, n, noise_scratch);
  const T* noise = noise_run(a.noise, layout, dtype, b, first, n, noise_scratch);
  if (a.prediction == Prediction::epsilon) return noise;
  const bool v = a.prediction == Prediction::v_prediction;
  const T alpha = v ? number<T>(a.alpha, b) : T(1);
  const T sigma = v ? number<T>(a.sigma, b) : T(1);
  const T* x0 = load(a.x0, dtype, offset, n, x0_scratch);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) noise_scratch[i] = madd(alpha, noise[i], -sigma * x0[i]);
  return noise_scratch;
}

template <typename E>
struct GapScratch {
  alignas(64) E fake[kChunk], cond[kChunk], uncond[kChunk];
  alignas(64) Wide<E> x0[kChunk], noise[kChunk];
};

// A chunk of outputs of element type E; `guidance` is whether there is an uncond.
template <typename E, bool guidance>
struct GapRuns {
  using T = Wide<E>;

  const E* fake;
  const E* cond;
  const E* uncond;
  const T* target;  // none where the outputs have none or it was not asked for
  T w;

  T guided(int64_t i) const {
    if constexpr (!guidance) return widen(cond[i]);
    const T from = widen(uncond[i]);
    return madd(w, widen(cond[i]) - from, from);
  }
  T gap(int64_t i) const { return guided(i) - widen(fake[i]); }
  T residual(int64_t i) const { return guided(i) - target[i]; }
};

// Calls `work` with the runs of a chunk.
template <typename E, typename Work>
inline void with_gap_runs(
    const Outputs& a, const Chunk& chunk, bool with_target, GapScratch<E>& scratch, const Work& work) {
  const auto [b, first, n, offset] = chunk;
  const E* fake = load(a.fake, a.dtype, offset, n, scratch.fake);
  const E* cond = load(a.cond, a.dtype, offset, n, scratch.cond);
  const Wide<E>* target =
      with_target ? target_run(a.target, a.dtype, a.layout, chunk, scratch.x0, scratch.noise) : nullptr;
  if (a.uncond == nullptr) {
    work(GapRuns<E, false>{fake, cond, nullptr, target, 1});
  } else {
    const E* uncond = load(a.uncond, a.dtype, offset, n, scratch.uncond);
    work(GapRuns<E, true>{fake, cond, uncond, target, static_cast<Wide<E>>(a.guidance_scale)});
  }
}

}  // namespace
}  // namespace diffpp
