// Addressed noise on the GPU: the words and the formula of csrc/cpu/philox.h, one block of four normals per call.
#pragma once

#include "elements.cuh"

namespace diffpp::cuda {

__device__ inline uint4 philox(uint32_t index, uint32_t stream, uint64_t sample, uint64_t seed) {
  uint4 c = make_uint4(index, stream, static_cast<uint32_t>(sample), static_cast<uint32_t>(sample >> 32));
  uint32_t k0 = static_cast<uint32_t>(seed);
  uint32_t k1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(c.x) * 0xD2511F53u;
    const uint64_t p1 = static_cast<uint64_t>(c.z) * 0xCD9E8D57u;
    c = make_uint4(
        static_cast<uint32_t>(p1 >> 32) ^ c.y ^ k0, static_cast<uint32_t>(p1), static_cast<uint32_t>(p0 >> 32) ^ c.w ^ k1,
        static_cast<uint32_t>(p0));
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c;
}

__device__ inline void box_muller(uint32_t a, uint32_t b, float& first, float& second) {
  const float u1 = static_cast<float>(a) * 0x1p-32f + 0x1p-33f;
  const float u2 = static_cast<float>(b) * 0x1p-32f;
  const float radius = sqrtf(-2.0f * logf(u1));
  float sine, cosine;
  sincospif(2.0f * u2, &sine, &cosine);
  first = radius * cosine;
  second = radius * sine;
}

// The normals of the elements [4 block, 4 block + 4) of a sample.
__device__ inline float4 normals(int64_t block, const Noise& noise, int64_t b) {
  const uint4 words = philox(
      static_cast<uint32_t>(block), noise.stream, static_cast<uint64_t>(noise.samples[b]), noise.seed);
  float4 result;
  box_muller(words.x, words.y, result.x, result.y);
  box_muller(words.z, words.w, result.z, result.w);
  return result;
}

// Element i of a sample in logical order, in memory: channels_last keeps [pixel][channel], row-major [channel][pixel].
__device__ inline int64_t in_memory(const Layout& layout, int64_t i) {
  if (layout.channels == 1) return i;
  if (layout.sample() <= UINT32_MAX) {  // a 64-bit division takes several times as long
    const uint32_t pixels = static_cast<uint32_t>(layout.pixels), index = static_cast<uint32_t>(i);
    return static_cast<int64_t>(index % pixels) * layout.channels + index / pixels;
  }
  return i % layout.pixels * layout.channels + i / layout.pixels;
}

}  // namespace diffpp::cuda
