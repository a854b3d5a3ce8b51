// A reward model's preprocessing and its adjoint: a separable resize by sparse tables. What is done to each pixel before
// (value range and clamp; for the adjoint, division by std) happens at the load, what is done after (normalisation; for
// the adjoint, the clamp's mask) at the store.
#pragma once

#include "../common/kernel.h"

namespace diffpp::reward_pixels {

// In schemas these are numbers.
enum class Fit : int32_t { crop, pad, stretch };
enum class Filter : int32_t { bilinear, bicubic };
enum class Clamp : int32_t { hard, straight_through, none };

// One axis of a resize: `in` pixels to `size` pixels, when the image's other side is `other_in`.
struct Resize {
  int64_t in;
  int64_t other_in;
  int64_t size;
  Fit fit;
  Filter filter;
  bool antialias;
};

struct Arguments {
  bool adjoint;
  Resize height;  // of the images
  Resize width;
  // [B, C, height, width]: images and the resized, or the resized's gradient and that of the images.
  const void* from;
  void* to;
  const void* images;  // for the gradient of the hard clamp: as `to`; else none
  Dtype from_dtype;
  Dtype to_dtype;  // also of `images`
  bool wide;       // double arithmetic
  // Pixels of `inner` channels, all of them (channels_last) or one. planes = B C / inner.
  int64_t planes;
  int64_t inner;
  int64_t channels;
  const double* mean;  // [C]
  const double* std;   // [C]
  double low;
  double high;
  bool clamp;
};

// The most channels of channels_last: on the CPU, the elements of a row that are worked on at a time.
constexpr int64_t kTile = 512;

// One axis of a call, as AxisTable of tables.h or its transpose. Weights are in the dtype of the arithmetic.
struct Axis {
  int64_t in;
  int64_t out;
  int64_t taps;
  const int64_t* first;  // [out]
  const int64_t* count;  // [out]
  const void* weights;   // [out, taps]
};

// A call with its tables.
struct Resampling : Arguments {
  Axis rows;
  Axis inputs;  // the transpose of `rows`: what each input row adds to
  Axis columns;
};

DIFFPP_CPU_KERNEL(resample, Resampling)

namespace cpu {
// `resample` with the tables, which are kept for the calls after it.
void run(const Arguments&, const Pool&);
}  // namespace cpu

namespace cuda {
// Copies bytes to a GPU, where they stay for as long as the process.
struct Upload {
  const void* (*copy)(const void* bytes, int64_t size, const void* context);
  const void* context;
  int32_t device;
};

// The first call with new tables copies them to the GPU and waits, which a CUDA graph cannot capture.
void run(const Arguments&, const Upload&, void* stream);
}  // namespace cuda

}  // namespace diffpp::reward_pixels
