// a gelu(b) of rows whose first half is a and whose second half is b, with the exact gelu(b) = b Phi(b).
#pragma once

#include "data.h"
#include "isa.h"

namespace diffpp {

struct GegluShape {
  int64_t rows;
  int64_t half;  // elements of a and of b

  // A row is cut into pieces, the work items.
  constexpr int64_t per_row() const { return (half + kChunk - 1) / kChunk; }
  constexpr int64_t items() const { return rows * per_row(); }
};

struct GegluForward {
  GegluShape shape;
  Dtype dtype;
  const void* x;  // [rows, 2 half]
  void* y;        // [rows, half]
};

struct GegluBackward {
  GegluShape shape;
  Dtype dtype;
  const void* grad_output;  // [rows, half]
  const void* x;            // [rows, 2 half], as grad_x
  void* grad_x;
};

DIFFPP_DECLARE_KERNEL(geglu_forward, GegluForward)
DIFFPP_DECLARE_KERNEL(geglu_backward, GegluBackward)

}  // namespace diffpp
