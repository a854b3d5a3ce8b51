// The sparse matrix of one axis of a resize: each output pixel is a weighted run of input pixels.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "arguments.h"

namespace diffpp::reward_pixels {

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

// The map of an axis: `axis_matrix` of the Python package says what it is.
AxisTable axis_table(const Resize& resize);

AxisTable transposed(const AxisTable& table);

// A table with its weights as kernels take them.
class Weights {
 public:
  explicit Weights(AxisTable table)
      : table_(std::move(table)), narrow_(table_.weights.begin(), table_.weights.end()) {}

  const AxisTable& table() const { return table_; }
  const void* weights(bool wide) const {
    return wide ? static_cast<const void*>(table_.weights.data()) : narrow_.data();
  }

  Axis view(bool wide) const {
    return {table_.in, table_.out, table_.taps, table_.first.data(), table_.count.data(), weights(wide)};
  }

 private:
  AxisTable table_;
  std::vector<float> narrow_;
};

struct Tables {
  Weights forward;
  Weights adjoint;

  const Weights& direction(bool is_adjoint) const { return is_adjoint ? adjoint : forward; }
};

inline auto key_of(const Resize& resize) {
  return std::tuple(resize.in, resize.other_in, resize.size, resize.fit, resize.filter, resize.antialias);
}

// The tables of an axis, built at first use and kept: a training run resizes one size.
std::shared_ptr<const Tables> tables_of(const Resize& resize);

}  // namespace diffpp::reward_pixels
