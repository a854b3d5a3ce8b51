// scale_b d / N_b with the statistics of d and r, where N_b is 1 or mean|r|.
#pragma once

#include "../common/kernel.h"

namespace diffpp::score_gap {

struct Arguments {
  Outputs outputs;
  double scale;
  PerSample scales;  // take the place of `scale` where given
  bool mean_abs;     // N = mean|r|, which needs the target
  void* gradient;
  void* gap_sq;  // [B] in the dtype of the arithmetic, as are the next two, which are for a target
  void* residual_abs;
  void* gap_dot_residual;
  double* partials = nullptr;  // sums of d^2, |r| and d r of parts of the samples
};

DIFFPP_CPU_KERNEL(forward, Arguments)

namespace cuda {
int64_t bytes_of_partials(const Arguments&);
void forward(const Arguments&, void* stream);
}  // namespace cuda

}  // namespace diffpp::score_gap
