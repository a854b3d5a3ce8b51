// |k| (sum d r - sid_alpha sum d^2) / mean|r| per sample, with no gradient through mean|r|.
#pragma once

#include "isa.h"
#include "outputs.h"

namespace diffpp {

struct SidLoss {
  Outputs outputs;
  double sid_alpha;
  double* partials;  // [chunks, 2]: sums of d (r - sid_alpha d) and |r|
  void* loss;        // [B] in the dtype of the arithmetic
  void* factor;      // [B] |k| / mean|r|
};

struct SidGradient {
  Outputs outputs;
  double sid_alpha;
  PerSample grad_output;
  PerSample factor;
  OutputGradients gradients;
};

// Work items are chunks; those of `combine`, which follows `forward`, are samples.
DIFFPP_DECLARE_KERNEL(sid_loss_forward, SidLoss)
DIFFPP_DECLARE_KERNEL(sid_loss_combine, SidLoss)
DIFFPP_DECLARE_KERNEL(sid_loss_backward, SidGradient)

}  // namespace diffpp
