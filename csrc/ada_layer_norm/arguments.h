// Layer normalisation without parameters, scaled and shifted by numbers that belong to the sample, forward and backward.
//
// T is float for float32, bfloat16 and float16 and double for float64.
#pragma once

#include "../common/kernel.h"

namespace diffpp::ada_layer_norm {

// x [B, rows, width].
struct Shape {
  int64_t batch;
  int64_t rows;
  int64_t width;
};

// A [B, width] tensor, dense within a sample.
struct PerColumn {
  const void* data;
  Dtype dtype;
  int64_t stride;  // of the samples
};

struct Forward {
  Shape shape;
  Dtype dtype;
  double eps;
  const void* x;
  PerColumn scale;
  PerColumn shift;
  void* y;     // like x
  void* mean;  // T [B, rows], as rstd
  void* rstd;
};

struct Backward {
  Shape shape;
  Dtype dtype;
  const void* grad_output;  // like x
  const void* x;
  const void* mean;
  const void* rstd;
  PerColumn scale;
  void* grad_x;      // like x, or null
  void* grad_scale;  // [B, width] in the dtype of scale, or null
  void* grad_shift;  // the same
};

DIFFPP_CPU_KERNEL(forward, Forward)
DIFFPP_CPU_KERNEL(backward, Backward)

}  // namespace diffpp::ada_layer_norm
