// What is known of a batch of network outputs at (x_t, t): the outputs, and what made x_t.
#pragma once

#include "data.h"

namespace diffpp {

// In the order of PREDICTION_TYPES in diffpp_fast/kernels/reference/prediction.py.
enum class Prediction : int32_t { epsilon, v_prediction, flow_prediction, sample };

// The target o* of a prediction type: eps, alpha eps - sigma x0, eps - x0 or x0. What it does not hold is never read.
struct Target {
  Prediction prediction = Prediction::epsilon;
  const void* x0 = nullptr;
  Noise noise;
  PerSample alpha;
  PerSample sigma;

  static constexpr bool holds_x0(Prediction prediction) { return prediction != Prediction::epsilon; }
  static constexpr bool holds_noise(Prediction prediction) { return prediction != Prediction::sample; }
};

// Three network outputs [B, ...]. guided = uncond + guidance_scale (cond - uncond), or cond where there is no uncond;
// d = guided - fake, r = guided - target.
struct Outputs {
  const void* fake;
  const void* cond;
  const void* uncond;
  double guidance_scale;
  Dtype dtype;  // of these, x0 and stored noise
  Layout layout;
  bool has_target;
  Target target;
};

// mean|r| as a divisor is at least this: MEAN_ABS_FLOOR in diffpp_fast/kernels/reference/score_gap.py.
constexpr double kMeanAbsFloor = 1e-6;

// Where the gradients of a loss on three outputs go; none where one is not needed.
struct OutputGradients {
  void* fake;
  void* cond;
  void* uncond;
  void* x0;
};

}  // namespace diffpp
