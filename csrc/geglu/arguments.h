// a gelu(b) of rows whose first half is a and whose second half is b, with the exact gelu(b) = b Phi(b).
#pragma once

#include "../common/kernel.h"

namespace diffpp::geglu {

struct Shape {
  int64_t rows;
  int64_t half;  // elements of a and of b
};

struct Forward {
  Shape shape;
  Dtype dtype;
  const void* x;  // [rows, 2 half]
  void* y;        // [rows, half]
};

struct Backward {
  Shape shape;
  Dtype dtype;
  const void* grad_output;  // [rows, half]
  const void* x;            // [rows, 2 half], as grad_x
  void* grad_x;
};

DIFFPP_CPU_KERNEL(forward, Forward)
DIFFPP_CPU_KERNEL(backward, Backward)

}  // namespace diffpp::geglu
