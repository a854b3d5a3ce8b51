// A reward model's preprocessing and its adjoint: a separable resize by sparse tables. What is done to each pixel before
// (value range and clamp; for the adjoint, division by std) happens at the load, what is done after (normalisation; for
// the adjoint, the clamp's mask) at the store.
#pragma once

#include "data.h"
#include "isa.h"

namespace diffpp {

// One axis of the resize, as AxisTable of filter.h, and its transpose. Weights are in the dtype of the arithmetic.
struct Axis {
  int64_t in;
  int64_t out;
  int64_t taps;
  const int64_t* first;  // [out]
  const int64_t* count;  // [out]
  const void* weights;   // [out, taps]
  // On GPUs: what the outputs [t tile, (t + 1) tile) read, inputs [windows[2 t], windows[2 t + 1]). Of the columns, `tile`
  // is 0 where the window of a single pixel is too wide for the GPU's tiles.
  int64_t tile = 0;
  const int64_t* windows = nullptr;
};

struct RewardPixels {
  const void* from;    // [B, C, rows.in, columns.in]
  void* to;            // [B, C, rows.out, columns.out]
  const void* images;  // for the gradient of the hard clamp: as `to`; else none
  Dtype from_dtype;
  Dtype to_dtype;  // also of `images`
  bool wide;       // double arithmetic
  // Pixels of `inner` channels, all of them (channels_last) or one. planes = B C / inner.
  int64_t planes;
  int64_t inner;
  int64_t channels;
  Axis rows;
  Axis inputs;  // the transpose of `rows`: what each input row adds to; not on GPUs
  Axis columns;
  const double* mean;  // [C]
  const double* std;   // [C]; not on GPUs
  double low;
  double high;
  bool clamp;
  const double* per_std = nullptr;  // [C], 1 / std: on GPUs, where a division takes registers
};

// Elements of a row that are worked on at a time, and the most channels of channels_last: a tile holds whole pixels.
constexpr int64_t kTile = 512;

// Output rows of a work item: a vector of them.
constexpr int64_t band_rows(bool wide) { return wide ? 8 : 16; }

// Elements of a row that a block of a GPU has at a time. Its first may be up to kGpuSlack before that of the window.
constexpr int64_t kGpuTile = 256;
constexpr int64_t kGpuSlack = 7;

// A work item is a band of output rows of a plane.
DIFFPP_DECLARE_KERNEL(reward_pixels_forward, RewardPixels)
DIFFPP_DECLARE_KERNEL(reward_pixels_backward, RewardPixels)

}  // namespace diffpp
