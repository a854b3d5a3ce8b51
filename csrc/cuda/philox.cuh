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

// Walks a sample in logical order and tells where its elements are in memory: channels_last keeps [pixel][channel],
// row-major [channel][pixel].
class Walk {
 public:
  // `per_pixels`: reciprocal(layout).
  __device__ Walk(const Layout& layout, uint64_t per_pixels, int64_t i) : layout_(layout) {
    channel_ = static_cast<int64_t>(__umul64hi(static_cast<uint64_t>(i), per_pixels));
    pixel_ = i - channel_ * layout.pixels;
    if (pixel_ >= layout.pixels) next_channel();
  }

  // 2^64 / pixels, rounded down: i times this is the channel of element i or the one before it. Divisions of 64 bits take
  // long, and registers: one for a thread, none for an element.
  __device__ static uint64_t reciprocal(const Layout& layout) {
    return layout.channels == 1 ? 0 : UINT64_MAX / static_cast<uint64_t>(layout.pixels);
  }

  __device__ int64_t in_memory() const { return pixel_ * layout_.channels + channel_; }

  __device__ void next() {
    if (++pixel_ == layout_.pixels) next_channel();
  }

 private:
  __device__ void next_channel() {
    pixel_ -= layout_.pixels;
    ++channel_;
  }

  const Layout& layout_;
  int64_t channel_, pixel_;
};

}  // namespace diffpp::cuda
