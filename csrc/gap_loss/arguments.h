// The losses of SiD and SIM per sample, with Q = sum d (r - slope d):
//   SiD: |k| Q / mean|r|, slope = sid_alpha, with no gradient through mean|r|;
//   SIM: m^2 Q / n, slope = 1, n = sqrt(m^2 sum d^2 + huber_c^2), where m scales outputs to scores.
// Both are factor Q, and both gradients are those of factor (Q - shrink / 2 sum d^2) with factor and shrink held fixed.
#pragma once

#include "../common/kernel.h"

namespace diffpp::gap_loss {

enum class Kind { sid, sim };

struct Forward {
  Outputs outputs;
  Kind kind;
  double option;  // sid_alpha or huber_c
  void* loss;     // [B] in the dtype of the arithmetic, as are the next two
  void* factor;   // |k| / mean|r| or m^2 / n
  void* shrink;   // of SIM alone: m^2 Q / n^2
};

struct Backward {
  Outputs outputs;
  double curvature;  // twice the slope
  PerSample grad_output;
  PerSample factor;
  PerSample shrink;  // none for SiD
  // Where the gradients go; none where one is not needed.
  void* grad_fake;
  void* grad_cond;
  void* grad_uncond;
  void* grad_x0;
};

DIFFPP_CPU_KERNEL(forward, Forward)
DIFFPP_CPU_KERNEL(backward, Backward)

}  // namespace diffpp::gap_loss
