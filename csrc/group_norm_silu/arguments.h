// Group normalisation with SiLU or nothing after it, forward and backward.
//
// T is float for float32, bfloat16 and float16 and double for float64.
#pragma once

#include "../common/kernel.h"

namespace diffpp::group_norm_silu {

// The most channels of a pixel in channels_last: the kernels for the CPU keep its coefficients on their stack.
constexpr int64_t kMostChannels = 4096;

// x [B, C, pixels] or, in channels_last, [B, pixels, C].
struct Shape {
  int64_t batch;
  int64_t channels;
  int64_t pixels;
  int64_t groups;
  bool channels_last;

  constexpr int64_t per_group() const { return channels / groups; }
};

struct Inputs {
  Shape shape;
  Dtype dtype;  // of x, y and their gradients
  bool silu;
  const void* x;
  PerSample weight;   // [C] in any dtype; none for 1
  PerSample bias;     // [C] in any dtype; none for 0
  PerSample offset{};  // [B, C] in any dtype, its stride that of the channels; none for 0
  int64_t offset_row = 0;
};

struct Forward : Inputs {
  double eps;
  void* y;                          // like x
  const void* residual = nullptr;  // like x, or null
  void* sum = nullptr;             // like x: x + residual, which is then normalised
  void* mean;                // T [B, G]
  void* rstd;                // T [B, G]
  void* partials = nullptr;  // mean and sum of squared deviations from it of parts of the groups
};

struct Backward : Inputs {
  const void* grad_output;   // like x
  const void* grad_sum;      // like x, added to grad_x, or null
  const void* mean;          // T [B, G]
  const void* rstd;          // T [B, G]
  void* grad_x;              // like x, or null
  void* grad_weight;         // [C] in the dtype of weight, or null
  void* grad_bias;           // [C] in the dtype of bias, or null
  void* partials = nullptr;  // sums of g and of g (x - mean), g the gradient before SiLU, of parts of the channels
};

DIFFPP_CPU_KERNEL(forward, Forward)
DIFFPP_CPU_KERNEL(backward, Backward)

namespace cuda {
int64_t bytes_of_partials(const Forward&);
int64_t bytes_of_partials(const Backward&);
void forward(const Forward&, void* stream);
void backward(const Backward&, void* stream);
}  // namespace cuda

}  // namespace diffpp::group_norm_silu
