#include "../cpu/reward_pixels.h"

#include <map>
#include <memory>
#include <mutex>
#include <tuple>
#include <utility>
#include <vector>

#include "../cpu/filter.h"
#include "tensor.h"

namespace diffpp {
namespace {

// In schemas, filter, fit and clamp are the numbers of these (the headers of torch's stable ABI never free a string
// that an operator takes).
enum class Clamp : int64_t { hard, straight_through, none };

// A table with its weights as kernels take them.
class Weights {
 public:
  explicit Weights(AxisTable table)
      : table_(std::move(table)), narrow_(table_.weights.begin(), table_.weights.end()) {}

  Axis view(bool wide) const {
    const void* weights = wide ? static_cast<const void*>(table_.weights.data()) : narrow_.data();
    return {table_.in, table_.out, table_.taps, table_.first.data(), table_.count.data(), weights};
  }

 private:
  AxisTable table_;
  std::vector<float> narrow_;
};

struct Tables {
  Weights forward;
  Weights adjoint;
};

// in, other_in, size, fit, filter, antialias
using Key = std::tuple<int64_t, int64_t, int64_t, Fit, Filter, bool>;

// The tables of an axis, built at first use and kept: a training run resizes one size.
std::shared_ptr<const Tables> tables_of(const Key& key) {
  constexpr size_t kept = 256;
  static std::mutex mutex;
  static std::map<Key, std::shared_ptr<const Tables>> cache;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = cache.find(key);
  if (found != cache.end()) return found->second;
  if (cache.size() == kept) cache.clear();
  const AxisTable table = std::apply(axis_table, key);
  auto tables = std::make_shared<const Tables>(Tables{Weights(table), Weights(transposed(table))});
  cache.emplace(key, tables);
  return tables;
}

// What forward and backward are told alike, checked.
struct Call {
  Call(const char* op, const Tensor& images, int64_t size, const std::vector<double>& mean,
       const std::vector<double>& std, int64_t filter, bool antialias, int64_t fit, int64_t clamp)
      : order((check_images(op, images), images), kTile), hard(static_cast<Clamp>(clamp) == Clamp::hard) {
    const auto channels = static_cast<size_t>(images.size(1));
    STD_TORCH_CHECK(size >= 1, op, ": size must be at least 1, got ", size);
    STD_TORCH_CHECK(
        mean.size() == channels && std.size() == channels, op, ": mean and std must have ", channels, " values");
    check_choice(op, "filter", filter, static_cast<int64_t>(Filter::bicubic));
    check_choice(op, "fit", fit, static_cast<int64_t>(Fit::stretch));
    check_choice(op, "clamp", clamp, static_cast<int64_t>(Clamp::none));
    const auto chosen_fit = static_cast<Fit>(fit);
    const auto chosen_filter = static_cast<Filter>(filter);
    const int64_t height = images.size(2), width = images.size(3);
    rows = tables_of({height, width, size, chosen_fit, chosen_filter, antialias});
    columns = tables_of({width, height, size, chosen_fit, chosen_filter, antialias});
    arguments.wide = images.scalar_type() == ScalarType::Double;
    arguments.channels = images.size(1);
    arguments.inner = order.layout().channels;
    arguments.planes = images.size(0) * arguments.channels / arguments.inner;
    arguments.mean = mean.data();
    arguments.std = std.data();
    arguments.clamp = static_cast<Clamp>(clamp) != Clamp::none;
  }

  static void check_choice(const char* op, const char* name, int64_t choice, int64_t last) {
    STD_TORCH_CHECK(choice >= 0 && choice <= last, op, ": ", name, " must be in [0, ", last, "], got ", choice);
  }

  static void check_images(const char* op, const Tensor& images) {
    dtype_of(op, "images", images);
    STD_TORCH_CHECK(
        images.dim() == 4 && images.size(1) > 0 && images.size(2) > 0 && images.size(3) > 0, op,
        ": images must have shape [B, C, H, W] with pixels");
  }

  void run(void (*kernel)(const RewardPixels&, int64_t, int64_t)) const {
    const int64_t band = band_rows(arguments.wide);
    const int64_t bands = (arguments.rows.out + band - 1) / band;
    // Elements read and written for a band, roughly.
    const int64_t work = (arguments.rows.in / bands + band) * (arguments.columns.in + arguments.columns.out);
    const int64_t grain = 1 + kChunksPerThread * kChunk / (work * arguments.inner);
    diffpp::run(kernel, arguments, arguments.planes * bands, grain);
  }

  Order order;
  bool hard;
  std::shared_ptr<const Tables> rows;
  std::shared_ptr<const Tables> columns;
  RewardPixels arguments{};
};

// images [B, C, H, W] -> [B, C, size, size] in `dtype`, channels_last if images are.
Tensor forward(
    const Tensor& images, int64_t size, std::vector<double> mean, std::vector<double> std, int64_t filter,
    bool antialias, int64_t fit, double low, double high, int64_t clamp, ScalarType dtype) {
  constexpr auto op = "reward_pixels";
  Call call(op, images, size, mean, std, filter, antialias, fit, clamp);
  const Tensor ordered = call.order.of(images);
  const int64_t sizes[] = {images.size(0), images.size(1), size, size};
  const bool channels_last = !images.is_contiguous() && is_channels_last(images);
  const Tensor empty = torch::stable::empty(
      {sizes, 4}, dtype, std::nullopt, images.device(), std::nullopt,
      channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  Result pixels(empty, call.order, dtype);
  RewardPixels& a = call.arguments;
  a.from = ordered.const_data_ptr();
  a.from_dtype = dtype_of(op, "images", images);
  a.to = pixels.data();
  a.to_dtype = dtype_of(op, "the result", empty);
  a.rows = call.rows->forward.view(a.wide);
  a.inputs = call.rows->adjoint.view(a.wide);
  a.columns = call.columns->forward.view(a.wide);
  a.low = low;
  a.high = high;
  call.run(reward_pixels_forward_kernel());
  return pixels.finish();
}

// grad_output [B, C, size, size], images [B, C, H, W] -> the gradient of the images, like them.
Tensor backward(
    const Tensor& grad_output, const Tensor& images, int64_t size, std::vector<double> mean, std::vector<double> std,
    int64_t filter, bool antialias, int64_t fit, double low, double high, int64_t clamp) {
  constexpr auto op = "reward_pixels_backward";
  Call call(op, images, size, mean, std, filter, antialias, fit, clamp);
  STD_TORCH_CHECK(
      grad_output.dim() == 4 && grad_output.size(0) == images.size(0) && grad_output.size(1) == images.size(1) &&
          grad_output.size(2) == size && grad_output.size(3) == size,
      op, ": grad_output must have shape [B, C, size, size]");
  const Tensor grad = call.order.of(grad_output);
  // Elsewhere the images are not read.
  const Tensor ordered = call.hard ? call.order.of(images) : images;
  Result grad_images(images, call.order);
  RewardPixels& a = call.arguments;
  a.from = grad.const_data_ptr();
  a.from_dtype = dtype_of(op, "grad_output", grad_output);
  a.to = grad_images.data();
  a.to_dtype = dtype_of(op, "images", images);
  a.images = call.hard ? ordered.const_data_ptr() : nullptr;
  a.rows = call.rows->adjoint.view(a.wide);
  a.inputs = call.rows->forward.view(a.wide);
  a.columns = call.columns->adjoint.view(a.wide);
  a.low = low;
  a.high = high;
  call.run(reward_pixels_backward_kernel());
  return grad_images.finish();
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(diffpp_fast, m) {
  m.def(
      "reward_pixels(Tensor images, int size, float[] mean, float[] std, int filter, bool antialias, int fit, "
      "float low, float high, int clamp, ScalarType dtype) -> Tensor");
  m.def(
      "reward_pixels_backward(Tensor grad_output, Tensor images, int size, float[] mean, float[] std, int filter, "
      "bool antialias, int fit, float low, float high, int clamp) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(diffpp_fast, CPU, m) {
  m.impl("reward_pixels", TORCH_BOX(&forward));
  m.impl("reward_pixels_backward", TORCH_BOX(&backward));
}

}  // namespace diffpp
