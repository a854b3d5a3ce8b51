// m^2 Q / n per sample, with Q = sum d r - sum d^2, n = sqrt(m^2 sum d^2 + huber_c^2), and m scaling outputs to scores.
#pragma once

#include "isa.h"
#include "outputs.h"

namespace diffpp {

struct SimLoss {
  Outputs outputs;
  double huber_c;
  double* partials;  // [chunks, 2]: sums of d^2 and d (r - d)
  void* loss;        // [B] in the dtype of the arithmetic
  void* factor;      // [B] m^2 / n
  void* shrink;      // [B] m^2 Q / n^2
};

struct SimGradient {
  Outputs outputs;
  PerSample grad_output;
  PerSample factor;
  PerSample shrink;
  OutputGradients gradients;
};

// Work items are chunks; those of `combine`, which follows `forward`, are samples.
DIFFPP_DECLARE_KERNEL(sim_loss_forward, SimLoss)
DIFFPP_DECLARE_KERNEL(sim_loss_combine, SimLoss)
DIFFPP_DECLARE_KERNEL(sim_loss_backward, SimGradient)

}  // namespace diffpp
