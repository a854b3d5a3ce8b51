// x_t = alpha x0 + sigma eps, and its gradient alpha g.
#pragma once

#include "data.h"
#include "isa.h"

namespace diffpp {

struct AddNoise {
  const void* x0;  // [B, ...] in `layout`, as are stored noise and x_t
  void* x_t;
  Dtype dtype;  // of all three
  Layout layout;
  PerSample alpha;
  PerSample sigma;  // none for the gradient, which has no noise
  Noise noise;
};

// A work item is a chunk of a sample.
DIFFPP_DECLARE_KERNEL(add_noise_forward, AddNoise)
DIFFPP_DECLARE_KERNEL(add_noise_backward, AddNoise)

}  // namespace diffpp
