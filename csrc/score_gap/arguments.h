// scale_b d / N_b with the statistics of d and r, where N_b is 1 or mean|r|; with a reward's score s
// (scale_b d - share_b reward_scale_b s) / N_b.
#pragma once

#include "../common/kernel.h"

namespace diffpp::score_gap {

// What a score s [B, ...] of a reward adds. share = min(1, clip ||scale d|| / ||reward_scale s||), 0 where that norm is not finite.
struct Reward {
  const void* score = nullptr;  // none: no reward
  double scale = 1.0;
  PerSample scales;  // take the place of `scale` where given
  double clip = 0.0;
  void* reward_sq = nullptr;  // sum s^2 [B] in the dtype of the arithmetic, as are the next two
  void* gap_dot_reward = nullptr;
  void* share = nullptr;
};

struct Arguments {
  Outputs outputs;
  double scale;
  PerSample scales;  // take the place of `scale` where given
  bool mean_abs;     // N = mean|r|, which needs the target
  void* gradient;
  void* gap_sq;  // [B] in the dtype of the arithmetic, as are the next two, which are for a target
  void* residual_abs;
  void* gap_dot_residual;
  Reward reward;
  double* partials = nullptr;  // sums of d^2, |r|, d r and, with a reward, s^2 and d s of parts of the samples

  int sums() const { return reward.score == nullptr ? 3 : 5; }
};

DIFFPP_CPU_KERNEL(forward, Arguments)

namespace cuda {
int64_t bytes_of_partials(const Arguments&);
void forward(const Arguments&, void* stream);
}  // namespace cuda

}  // namespace diffpp::score_gap
