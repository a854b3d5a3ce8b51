// mean over b of weight_b * mean over elements of (prediction - target)^2, and its gradient by the prediction.
#pragma once

#include "../common/kernel.h"

namespace diffpp::denoising_loss {

struct Forward {
  const void* prediction;  // [B, ...] in `layout`, as are x0, stored noise and the residual
  void* residual;          // prediction - target; none where no gradient will be asked for
  Dtype dtype;
  Layout layout;
  Target target;
  PerSample weight;
  void* loss;                  // a scalar in the dtype of the arithmetic
  double* partials = nullptr;  // sums of squares of parts of the samples
};

struct Backward {
  const void* residual;
  void* gradient;
  Dtype dtype;
  Layout layout;
  PerSample grad_output;  // a scalar: of stride 0
  PerSample weight;
};

DIFFPP_CPU_KERNEL(forward, Forward)
DIFFPP_CPU_KERNEL(backward, Backward)

namespace cuda {
int64_t bytes_of_partials(const Forward&);
void forward(const Forward&, void* stream);
void backward(const Backward&, void* stream);
}  // namespace cuda

}  // namespace diffpp::denoising_loss
