// Addressed noise as tensors: normals [B, N], uniforms and integers [B].
#pragma once

#include "../common/kernel.h"

namespace diffpp::noise {

struct Normals {
  void* to;  // [B, N], row-major
  Dtype dtype;
  Layout layout;  // channels = 1
  Noise noise;
};

struct Single {
  int64_t batch;
  float* uniform;     // [B] in [0, 1), or
  int64_t* integers;  // [B] in [low, low + range)
  int64_t low;
  uint64_t range;  // at most 2^32
  Noise noise;
};

// One block of the generator, for known-answer tests.
struct Block {
  uint64_t index;   // word 0 of the counter
  uint32_t stream;  // word 1
  uint64_t sample;  // words 2 and 3
  uint64_t seed;    // the key
  uint32_t* words;  // [4]
};

DIFFPP_CPU_KERNEL(draw_normals, Normals)
DIFFPP_CPU_KERNEL(draw_single, Single)
DIFFPP_CPU_KERNEL(philox_block, Block)

namespace cuda {
void draw_normals(const Normals&, void* stream);
void draw_single(const Single&, void* stream);
}  // namespace cuda

}  // namespace diffpp::noise
