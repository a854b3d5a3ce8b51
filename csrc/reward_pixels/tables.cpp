#include "tables.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <mutex>

namespace diffpp::reward_pixels {
namespace {

double triangle(double distance) { return std::max(1.0 - distance, 0.0); }

// Keys' cubic convolution kernel.
double cubic(double distance, double a) {
  if (distance < 1.0) return ((a + 2.0) * distance - (a + 3.0)) * (distance * distance) + 1.0;
  if (distance < 2.0) return (((distance - 5.0) * distance + 8.0) * distance - 4.0) * a;
  return 0.0;
}

// Resizing one axis to `resized` pixels.
class Rows {
 public:
  Rows(int64_t in, int64_t resized, Filter filter, bool antialias)
      : in_(in),
        filter_(filter),
        antialias_(antialias),
        scale_(static_cast<double>(in) / static_cast<double>(resized)),
        stretch_(antialias ? std::max(scale_, 1.0) : 1.0),
        // At scale 1 both filters are 1 at their own pixel and 0 at the others.
        support_(in == resized ? 0.5 : (filter == Filter::bilinear ? 1.0 : 2.0) * stretch_) {}

  int64_t taps() const { return std::min(static_cast<int64_t>(std::ceil(2.0 * support_)) + 1, in_); }

  // Row o of the resize as row `to` of `table`.
  void write(int64_t o, AxisTable& table, int64_t to) const {
    const double center = (static_cast<double>(o) + 0.5) * scale_;
    const int64_t begin = static_cast<int64_t>(std::floor(center - support_ + 0.5));
    const int64_t end = static_cast<int64_t>(std::floor(center + support_ + 0.5));
    // With antialiasing the filter is cut at the border; without, the border pixel is repeated.
    const int64_t from = antialias_ ? std::max<int64_t>(begin, 0) : begin;
    const int64_t until = antialias_ ? std::min(end, in_) : end;
    // Kahan's sum: the weights of a wide filter are as good as those of a narrow one.
    double total = 0.0, lost = 0.0;
    for (int64_t i = from; i < until; ++i) {
      const double add = weight(i, center) - lost;
      const double sum = total + add;
      lost = (sum - total) - add;
      total = sum;
    }
    const auto pixel = [&](int64_t i) { return std::clamp<int64_t>(i, 0, in_ - 1); };
    table.first[to] = pixel(from);
    table.count[to] = pixel(until - 1) - pixel(from) + 1;
    double* row = &table.weights[to * table.taps];
    for (int64_t i = from; i < until; ++i) row[pixel(i) - table.first[to]] += weight(i, center) / total;
  }

 private:
  double weight(int64_t i, double center) const {
    const double distance = std::abs((static_cast<double>(i) - center + 0.5) / stretch_);
    return filter_ == Filter::bilinear ? triangle(distance) : cubic(distance, antialias_ ? -0.5 : -0.75);
  }

  int64_t in_;
  Filter filter_;
  bool antialias_;
  double scale_;
  double stretch_;
  double support_;
};

}  // namespace

std::optional<Fit> fit_named(const std::string& name) {
  if (name == "crop") return Fit::crop;
  if (name == "pad") return Fit::pad;
  if (name == "stretch") return Fit::stretch;
  return std::nullopt;
}

std::optional<Filter> filter_named(const std::string& name) {
  if (name == "bilinear") return Filter::bilinear;
  if (name == "bicubic") return Filter::bicubic;
  return std::nullopt;
}

AxisTable axis_table(const Resize& resize) {
  const int64_t in = resize.in, other_in = resize.other_in, size = resize.size;
  // Row o of the table is row o + top of the resize. nearbyint rounds halves to even, as Python does.
  int64_t resized = size;
  int64_t top = 0;
  if (resize.fit == Fit::crop && in > other_in) {
    resized = static_cast<int64_t>(static_cast<double>(size * in) / static_cast<double>(other_in));
    top = static_cast<int64_t>(std::nearbyint(static_cast<double>(resized - size) / 2.0));
  } else if (resize.fit == Fit::pad && in < other_in) {
    const double scale = static_cast<double>(size) / static_cast<double>(other_in);
    resized = std::max<int64_t>(1, static_cast<int64_t>(std::nearbyint(static_cast<double>(in) * scale)));
    top = -((size - resized) / 2);
  }
  const Rows rows(in, resized, resize.filter, resize.antialias);
  AxisTable table{in, size, rows.taps(), {}, {}, {}};
  table.first.resize(size);
  table.count.resize(size);
  table.weights.resize(size * table.taps);
  for (int64_t o = std::max<int64_t>(0, -top); o < size && o + top < resized; ++o) rows.write(o + top, table, o);
  return table;
}

AxisTable transposed(const AxisTable& table) {
  AxisTable result{table.out, table.in, 0, {}, {}, {}};
  result.first.resize(result.out);
  result.count.resize(result.out);
  for (int64_t o = 0; o < table.out; ++o) {
    for (int64_t i = table.first[o]; i < table.first[o] + table.count[o]; ++i) {
      if (result.count[i] == 0) result.first[i] = o;
      result.count[i] = o - result.first[i] + 1;
      result.taps = std::max(result.taps, result.count[i]);
    }
  }
  result.weights.resize(result.out * result.taps);
  for (int64_t o = 0; o < table.out; ++o)
    for (int64_t k = 0; k < table.count[o]; ++k) {
      const int64_t i = table.first[o] + k;
      result.weights[i * result.taps + o - result.first[i]] = table.weights[o * table.taps + k];
    }
  return result;
}

std::shared_ptr<const Tables> tables_of(const Resize& resize) {
  constexpr size_t kept = 256;
  static std::mutex mutex;
  static std::map<decltype(key_of(resize)), std::shared_ptr<const Tables>> cache;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = cache.find(key_of(resize));
  if (found != cache.end()) return found->second;
  if (cache.size() == kept) cache.clear();
  const AxisTable table = axis_table(resize);
  auto tables = std::make_shared<const Tables>(Tables{Weights(table), Weights(transposed(table))});
  cache.emplace(key_of(resize), tables);
  return tables;
}

void cpu::run(const Arguments& arguments, const Pool& pool) {
  const auto height = tables_of(arguments.height), width = tables_of(arguments.width);
  const bool adjoint = arguments.adjoint, wide = arguments.wide;
  const Resampling call{
      arguments, height->direction(adjoint).view(wide), height->direction(!adjoint).view(wide),
      width->direction(adjoint).view(wide)};
  resample(call, pool);
}

}  // namespace diffpp::reward_pixels
