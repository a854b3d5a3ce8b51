// x_t = alpha x0 + sigma eps, and its gradient alpha g.
#pragma once

#include "../common/kernel.h"

namespace diffpp::add_noise {

struct Forward {
  const void* x0;  // [B, ...] in `layout`, as are stored noise and x_t
  void* x_t;
  Dtype dtype;  // of all three
  Layout layout;
  PerSample alpha;
  PerSample sigma;
  Noise noise;
};

struct Backward {
  const void* grad_output;  // [B, ...] in `layout`, as grad_x0
  void* grad_x0;
  Dtype dtype;
  Layout layout;
  PerSample alpha;
};

DIFFPP_CPU_KERNEL(forward, Forward)
DIFFPP_CPU_KERNEL(backward, Backward)

namespace cuda {
void forward(const Forward&, void* stream);
void backward(const Backward&, void* stream);
}  // namespace cuda

}  // namespace diffpp::add_noise
