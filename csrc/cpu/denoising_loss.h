// mean over b of weight_b * mean over elements of (prediction - target)^2, and its gradient by the prediction.
#pragma once

#include "isa.h"
#include "outputs.h"

namespace diffpp {

struct DenoisingLoss {
  const void* prediction;  // [B, ...] in `layout`, as are x0, stored noise and the residual
  void* residual;          // prediction - target; none where no gradient will be asked for
  Dtype dtype;
  Layout layout;
  Target target;
  PerSample weight;
  double* partials;  // [chunks] sums of squares
  void* loss;        // a scalar in the dtype of the arithmetic
};

struct DenoisingGradient {
  const void* residual;
  void* gradient;
  Dtype dtype;
  Layout layout;
  PerSample grad_output;  // a scalar: of stride 0
  PerSample weight;
};

// Work items are chunks; `combine` has one item and follows `forward`.
DIFFPP_DECLARE_KERNEL(denoising_loss_forward, DenoisingLoss)
DIFFPP_DECLARE_KERNEL(denoising_loss_combine, DenoisingLoss)
DIFFPP_DECLARE_KERNEL(denoising_loss_backward, DenoisingGradient)

}  // namespace diffpp
