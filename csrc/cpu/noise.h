// Addressed noise as tensors: normals [B, N], uniforms and integers [B].
#pragma once

#include "data.h"
#include "isa.h"

namespace diffpp {

struct DrawNormal {
  void* to;  // [B, N], row-major
  Dtype dtype;
  Layout layout;  // channels = 1
  Noise noise;
};

struct DrawOne {
  float* uniform;     // [B] in [0, 1), or
  int64_t* integers;  // [B] in [low, low + range)
  int64_t low;
  uint64_t range;  // at most 2^32
  Noise noise;
};

// One block of the generator, for known-answer tests.
struct PhiloxBlock {
  uint64_t index;   // word 0 of the counter
  uint32_t stream;  // word 1
  uint64_t sample;  // words 2 and 3
  uint64_t seed;    // the key
  uint32_t* words;  // [4]
};

// A work item is a chunk of a sample.
DIFFPP_DECLARE_KERNEL(draw_normal, DrawNormal)
// A work item is a sample.
DIFFPP_DECLARE_KERNEL(draw_one, DrawOne)
DIFFPP_DECLARE_KERNEL(philox_block, PhiloxBlock)

}  // namespace diffpp
