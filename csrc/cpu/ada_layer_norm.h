// Layer normalisation without parameters, scaled and shifted by numbers that belong to the sample, forward and backward.
//
// T is float for float32, bfloat16 and float16 and double for float64.
#pragma once

#include "data.h"
#include "isa.h"

namespace diffpp {

// Rows of a work item of the backward pass: they share the two sums per column that it leaves.
constexpr int64_t kRowsPerSum = 32;

// x [B, rows, width].
struct AdaLayerNormShape {
  int64_t batch;
  int64_t rows;
  int64_t width;

  constexpr int64_t row_chunks() const { return (rows + kRowsPerSum - 1) / kRowsPerSum; }
  constexpr int64_t pieces() const { return (width + kChunk - 1) / kChunk; }
};

// A [B, width] tensor, dense within a sample.
struct PerColumn {
  const void* data;
  Dtype dtype;
  int64_t stride;  // of the samples
};

struct AdaLayerNormForward {
  AdaLayerNormShape shape;
  Dtype dtype;
  double eps;
  const void* x;
  PerColumn scale;
  PerColumn shift;
  void* y;     // like x
  void* mean;  // T [B, rows], as rstd
  void* rstd;
};

struct AdaLayerNormBackward {
  AdaLayerNormShape shape;
  Dtype dtype;
  const void* grad_output;  // like x
  const void* x;
  const void* mean;
  const void* rstd;
  PerColumn scale;
  void* grad_x;      // like x, or null
  void* partials;    // T [B, row chunks, 2, width]: sums of g normalized and of g; or null
  void* grad_scale;  // [B, width] in the dtype of scale, or null
  void* grad_shift;  // the same
};

// Work items: rows; chunks of rows; pieces of the columns of a sample, after the chunks.
DIFFPP_DECLARE_KERNEL(ada_layer_norm_forward, AdaLayerNormForward)
DIFFPP_DECLARE_KERNEL(ada_layer_norm_backward, AdaLayerNormBackward)
DIFFPP_DECLARE_KERNEL(ada_layer_norm_combine, AdaLayerNormBackward)

}  // namespace diffpp
