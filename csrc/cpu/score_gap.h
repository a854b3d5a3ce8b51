// scale_b d / N_b with the statistics of d and r, where N_b is 1 or mean|r|.
#pragma once

#include "isa.h"
#include "outputs.h"

namespace diffpp {

struct ScoreGap {
  Outputs outputs;
  double scale;
  PerSample scales;  // take the place of `scale` where given
  bool mean_abs;     // N = mean|r|, which needs the target
  void* gradient;
  double* partials;        // [chunks, 3]: sums of d^2, |r| and d r
  void* gap_sq;            // [B] in the dtype of the arithmetic, as are the next two, which are for a target
  void* residual_abs;
  void* gap_dot_residual;
};

// The work in three stages: chunks, then samples, then chunks; without mean_abs the first writes the gradient already.
DIFFPP_DECLARE_KERNEL(score_gap_sums, ScoreGap)
DIFFPP_DECLARE_KERNEL(score_gap_statistics, ScoreGap)
DIFFPP_DECLARE_KERNEL(score_gap_normalize, ScoreGap)

// All stages on whole samples, so that the last finds its data in the cache.
DIFFPP_DECLARE_KERNEL(score_gap_samples, ScoreGap)

}  // namespace diffpp
