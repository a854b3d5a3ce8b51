// The sparse matrix of one axis of a resize: each output pixel is a weighted run of input pixels.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace diffpp {

enum class Fit : int32_t { crop, pad, stretch };
enum class Filter : int32_t { bilinear, bicubic };

// Row o is the sum over k < count[o] of weights[o * taps + k] times pixel first[o] + k. Over the rows with count > 0,
// first and first + count never decrease.
struct AxisTable {
  int64_t in = 0;
  int64_t out = 0;
  int64_t taps = 0;  // the largest count
  std::vector<int64_t> first;
  std::vector<int64_t> count;
  std::vector<double> weights;  // [out, taps], zero from count on
};

std::optional<Fit> fit_named(const std::string& name);
std::optional<Filter> filter_named(const std::string& name);

// The map of an axis of `in` pixels to `size` pixels when the image's other side is `other_in`: `axis_matrix` of
// diffpp_fast/kernels/reference/reward_pixels.py says what it is.
AxisTable axis_table(int64_t in, int64_t other_in, int64_t size, Fit fit, Filter filter, bool antialias);

AxisTable transposed(const AxisTable& table);

}  // namespace diffpp
