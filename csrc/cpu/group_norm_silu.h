// Group normalisation with SiLU or nothing after it, forward and backward.
//
// T is float for float32, bfloat16 and float16 and double for float64. A tensor is worked on in lines, which are cut
// into pieces of fixed length. Each piece leaves partial results; they are combined in order, so the bits depend on the
// shape alone.
#pragma once

#include "data.h"
#include "isa.h"

namespace diffpp {

// Of a pixel in channels_last: the kernels keep its coefficients on their stack.
constexpr int64_t kMostChannels = 4096;

struct Pieces {
  int64_t lines;
  int64_t line;      // elements of a line
  int64_t length;    // elements of a piece; the last of a line may be shorter
  int64_t per_line;

  constexpr Pieces(int64_t lines, int64_t line, int64_t length)
      : lines(lines), line(line), length(length), per_line((line + length - 1) / length) {}

  constexpr int64_t count() const { return lines * per_line; }
};

// x [B, C, pixels] or, in channels_last, [B, pixels, C].
struct GroupNormShape {
  int64_t batch;
  int64_t channels;
  int64_t pixels;
  int64_t groups;
  bool channels_last;

  constexpr int64_t per_group() const { return channels / groups; }

  // In channels_last the kernels go by rows of whole pixels, wide enough for vectors when channels are few.
  constexpr int64_t row() const { return channels < kRow ? kRow / channels * channels : channels; }

  // For the sums over a group. Row-major: a line is a group of a sample. channels_last: a sample.
  constexpr Pieces group_pieces() const {
    return channels_last ? bands() : Pieces(batch * groups, per_group() * pixels, kChunk);
  }

  // For work by channel. Row-major: a line is a channel of a sample. channels_last: a sample.
  constexpr Pieces channel_pieces() const {
    return channels_last ? bands() : Pieces(batch * channels, pixels, kChunk);
  }

 private:
  static constexpr int64_t kRow = 512;
  // Enough that the two numbers per channel that a band leaves are few; 128 KB of float32 at 512 channels.
  static constexpr int64_t kRowsPerBand = 64;

  constexpr Pieces bands() const { return {batch, channels * pixels, kRowsPerBand * row()}; }
};

struct GroupNormInputs {
  GroupNormShape shape;
  Dtype dtype;  // of x, y and their gradients
  bool silu;
  const void* x;
  PerSample weight;  // [C] in any dtype; none for 1
  PerSample bias;    // [C] in any dtype; none for 0
};

struct GroupNormForward : GroupNormInputs {
  double eps;
  void* y;           // like x
  void* mean;        // T [B, G]
  void* rstd;        // T [B, G]
  // Mean, sum of squared deviations from it: [B, group pieces, 2, G]. GPU kernels cut otherwise, and say how much they need.
  double* partials;
};

struct GroupNormBackward : GroupNormInputs {
  const void* grad_output;  // like x
  const void* mean;         // T [B, G]
  const void* rstd;         // T [B, G]
  void* partials;           // T [B, channel pieces, 2, C]: of g and of g (x - mean), g the gradient before SiLU
  void* sums;               // T [B, 2, C]: of g and of g (x - mean) rstd; not on GPUs
  void* terms;  // T [B, 2, G]: slope and offset in dx = g weight rstd + slope (x - mean) + offset; not on GPUs
  void* grad_x;             // like x, or null
  void* grad_weight;        // [C] in the dtype of weight, or null
  void* grad_bias;          // [C] in the dtype of bias, or null
};

// Three stages, each of which needs the one before it to be complete. Work items: group pieces; groups of samples;
// channel pieces.
DIFFPP_DECLARE_KERNEL(group_norm_statistics, GroupNormForward)
DIFFPP_DECLARE_KERNEL(group_norm_moments, GroupNormForward)
DIFFPP_DECLARE_KERNEL(group_norm_activate, GroupNormForward)
// The three for a line of the group pieces at a time, which is then still in a cache. A work item is a line.
DIFFPP_DECLARE_KERNEL(group_norm_forward, GroupNormForward)

// Work items: channel pieces; groups of samples; channel pieces. And again the three for a line of the group pieces at
// a time.
DIFFPP_DECLARE_KERNEL(group_norm_sums, GroupNormBackward)
DIFFPP_DECLARE_KERNEL(group_norm_terms, GroupNormBackward)
DIFFPP_DECLARE_KERNEL(group_norm_input_gradient, GroupNormBackward)
DIFFPP_DECLARE_KERNEL(group_norm_backward, GroupNormBackward)
// The gradients of weight and bias from `sums`. A work item is a channel.
DIFFPP_DECLARE_KERNEL(group_norm_parameter_gradients, GroupNormBackward)

}  // namespace diffpp
