// What kernels and their callers both know of a tensor: its dtype, its layout, the noise that belongs to it.
#pragma once

#include <cstdint>

namespace diffpp {

enum class Dtype : int32_t { float32, bfloat16, float16, float64 };

// An element of a bfloat16 array, for loops that convert as they go.
struct Bfloat16 {
  uint16_t pattern;
};

// Whether an array of this dtype can be read as float, double or Bfloat16 without conversion.
template <typename T>
constexpr bool holds(Dtype dtype) {
  return dtype == (sizeof(T) == sizeof(float)    ? Dtype::float32
                   : sizeof(T) == sizeof(double) ? Dtype::float64
                                                 : Dtype::bfloat16);
}

// A [B] tensor; no data where an optional one was not given.
struct PerSample {
  const void* data = nullptr;
  Dtype dtype = Dtype::float32;
  int64_t stride = 0;
};

// A dense [B, ...] tensor in one of two orders. Row-major: channels = 1. channels_last: sample[c][p] is at p * channels + c.
struct Layout {
  int64_t batch;
  int64_t channels;
  int64_t pixels;

  constexpr int64_t sample() const { return channels * pixels; }
};

// Samples are cut into chunks of whole pixels, the same for any number of threads: work items, and the unit of every
// reduction's first stage. Eight chunks of float32 fit in a first-level cache.
constexpr int64_t kChunk = 2048;

// Terms that are added up in the dtype of the arithmetic before the sum goes on in double: longer sums of float32 would
// lose precision where vectors are narrow.
constexpr int64_t kSumRun = 512;

struct Chunk {
  int64_t b;       // the sample
  int64_t first;   // of its elements, in memory order
  int64_t n;       // elements
  int64_t offset;  // of `first` from the start of the tensor
};

struct Chunks {
  int64_t sample;      // elements of a sample
  int64_t length;      // elements of a chunk; the last of a sample may be shorter
  int64_t per_sample;  // chunks of a sample
  int64_t count;       // chunks of the batch

  explicit constexpr Chunks(const Layout& layout)
      : sample(layout.sample()),
        length(kChunk / layout.channels * layout.channels),
        per_sample((sample + length - 1) / length),
        count(layout.batch * per_sample) {}

  constexpr Chunk operator[](int64_t item) const {
    const int64_t b = item / per_sample;
    const int64_t first = item % per_sample * length;
    const int64_t n = sample - first < length ? sample - first : length;
    return {b, first, n, b * sample + first};
  }
};

// The noise of a batch: stored as a tensor laid out like the data, or an address (see philox.h).
struct Noise {
  const void* stored = nullptr;
  const int64_t* samples = nullptr;
  uint64_t seed = 0;
  uint32_t stream = 0;
};

}  // namespace diffpp
