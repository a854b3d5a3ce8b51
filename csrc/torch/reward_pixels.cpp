#include "../cpu/reward_pixels.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <tuple>
#include <utility>
#include <vector>

#include "../cpu/filter.h"
#include "cuda.h"
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

#if defined(DIFFPP_CUDA)
// What the outputs of each tile read: [tiles, 2] as `windows` of Axis.
std::vector<int64_t> windows_of(const AxisTable& table, int64_t tile) {
  std::vector<int64_t> windows;
  for (int64_t begin = 0; begin < table.out; begin += tile) {
    int64_t first = table.in, end = 0;
    for (int64_t o = begin; o < std::min(begin + tile, table.out); ++o) {
      if (table.count[o] == 0) continue;
      first = std::min(first, table.first[o]);
      end = std::max(end, table.first[o] + table.count[o]);
    }
    windows.insert(windows.end(), {end > 0 ? first : 0, end});
  }
  return windows;
}

// The most output pixels of `inner` channels whose windows a block of the GPU can hold, balanced over the tiles; 0 if a single
// one is too wide.
int64_t column_tile(const AxisTable& table, int64_t inner) {
  const auto fits = [&](int64_t tile) {
    const std::vector<int64_t> windows = windows_of(table, tile);
    for (size_t t = 0; t < windows.size(); t += 2)
      if ((windows[t + 1] - windows[t]) * inner + kGpuSlack > kGpuTile) return false;
    return true;
  };
  int64_t tile = std::min(table.out, kGpuTile / inner);
  while (tile > 0 && !fits(tile)) --tile;
  if (tile == 0) return 0;
  const int64_t tiles = (table.out + tile - 1) / tile;
  return (table.out + tiles - 1) / tiles;
}

// The tables of both axes and directions with mean and std, in one piece of a GPU's memory.
class GpuTables {
 public:
  GpuTables(const Tables& rows, const Tables& columns, const RewardPixels& a, const Tensor& beside) : wide_(a.wide) {
    add(rows.forward, band_rows(wide_), axes_[0]);
    add(columns.forward, column_tile(columns.forward.table(), a.inner), axes_[1]);
    add(rows.adjoint, band_rows(wide_), axes_[2]);
    add(columns.adjoint, column_tile(columns.adjoint.table(), a.inner), axes_[3]);
    mean_ = append(a.mean, a.channels * sizeof(double));
    std::vector<double> per_std(a.std, a.std + a.channels);
    for (double& value : per_std) value = 1.0 / value;
    per_std_ = append(per_std.data(), per_std.size() * sizeof(double));
    const int64_t numbers = static_cast<int64_t>(bytes_.size() / sizeof(int64_t));
    const int64_t stride = 1;
    const Tensor host = torch::stable::from_blob(
        bytes_.data(), {&numbers, 1}, {&stride, 1}, torch::stable::Device(torch::headeronly::DeviceType::CPU),
        ScalarType::Long);
    memory_ = empty_vector(numbers, ScalarType::Long, beside);
    // Waits until it is there: later calls may be on other streams.
    torch::stable::copy_(memory_, host);
    bytes_ = {};
  }

  void view(bool adjoint, RewardPixels& a) const {
    a.rows = axis(axes_[adjoint ? 2 : 0]);
    a.columns = axis(axes_[adjoint ? 3 : 1]);
    a.mean = at<double>(mean_);
    a.per_std = at<double>(per_std_);
  }

 private:
  struct Entry {
    Axis sizes;
    size_t first, count, weights, windows;
  };

  template <typename T>
  const T* at(size_t byte) const {
    return reinterpret_cast<const T*>(static_cast<const char*>(memory_.const_data_ptr()) + byte);
  }

  Axis axis(const Entry& entry) const {
    Axis result = entry.sizes;
    result.first = at<int64_t>(entry.first);
    result.count = at<int64_t>(entry.count);
    result.weights = at<char>(entry.weights);
    result.windows = at<int64_t>(entry.windows);
    return result;
  }

  void add(const Weights& weights, int64_t tile, Entry& entry) {
    const AxisTable& table = weights.table();
    entry.sizes = {table.in, table.out, table.taps, nullptr, nullptr, nullptr, tile};
    entry.first = append(table.first.data(), table.first.size() * sizeof(int64_t));
    entry.count = append(table.count.data(), table.count.size() * sizeof(int64_t));
    entry.weights =
        append(weights.weights(wide_), table.weights.size() * (wide_ ? sizeof(double) : sizeof(float)));
    const std::vector<int64_t> windows = tile > 0 ? windows_of(table, tile) : std::vector<int64_t>();
    entry.windows = append(windows.data(), windows.size() * sizeof(int64_t));
  }

  // Returns where the data begins, a multiple of eight bytes.
  size_t append(const void* data, size_t size) {
    const size_t begin = bytes_.size();
    bytes_.resize((begin + size + 7) / 8 * 8);
    if (size > 0) std::memcpy(bytes_.data() + begin, data, size);
    return begin;
  }

  bool wide_;
  Entry axes_[4];
  size_t mean_, per_std_;
  std::vector<char> bytes_;
  Tensor memory_;
};

// The tables on the GPU of `beside`, copied there by the first call with them: a copy that waits, which a CUDA graph cannot
// capture. They stay for as long as the process, for a graph may hold their address.
const GpuTables& gpu_tables_of(
    const Key& row_key, const Key& column_key, const Tables& rows, const Tables& columns, const RewardPixels& a,
    const std::vector<double>& mean, const std::vector<double>& std, const Tensor& beside) {
  using GpuKey = std::tuple<int32_t, bool, int64_t, Key, Key, std::vector<double>, std::vector<double>>;
  static std::mutex mutex;
  // Never destroyed: at the end of the process CUDA may be gone first.
  static auto& cache = *new std::map<GpuKey, GpuTables>();
  const std::lock_guard<std::mutex> lock(mutex);
  const GpuKey key(beside.get_device_index(), a.wide, a.inner, row_key, column_key, mean, std);
  const auto found = cache.find(key);
  if (found != cache.end()) return found->second;
  return cache.try_emplace(key, rows, columns, a, beside).first->second;
}
#endif

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
    const Key row_key{height, width, size, chosen_fit, chosen_filter, antialias};
    const Key column_key{width, height, size, chosen_fit, chosen_filter, antialias};
    rows = tables_of(row_key);
    columns = tables_of(column_key);
    arguments.wide = images.scalar_type() == ScalarType::Double;
    arguments.channels = images.size(1);
    arguments.inner = order.layout().channels;
    arguments.planes = images.size(0) * arguments.channels / arguments.inner;
    arguments.mean = mean.data();
    arguments.std = std.data();
    arguments.clamp = static_cast<Clamp>(clamp) != Clamp::none;
#if defined(DIFFPP_CUDA)
    STD_TORCH_CHECK(
        !images.is_cuda() || std::max({arguments.planes, height, width * arguments.inner}) <= UINT32_MAX, op,
        ": images with 2^32 or more planes, rows or elements of a row are not served on GPUs");
    if (images.is_cuda()) gpu = &gpu_tables_of(row_key, column_key, *rows, *columns, arguments, mean, std, images);
#endif
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

  // The tables of one direction, where the kernels are.
  void choose(bool adjoint) {
#if defined(DIFFPP_CUDA)
    if (gpu != nullptr) return gpu->view(adjoint, arguments);
#endif
    const auto direction = [&](const Tables& tables, bool transposed) {
      return (transposed ? tables.adjoint : tables.forward).view(arguments.wide);
    };
    arguments.rows = direction(*rows, adjoint);
    arguments.inputs = direction(*rows, !adjoint);
    arguments.columns = direction(*columns, adjoint);
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
#if defined(DIFFPP_CUDA)
  const GpuTables* gpu = nullptr;
#endif
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
  call.choose(false);
  a.low = low;
  a.high = high;
  if (!DIFFPP_ON_CUDA(images, reward_pixels_forward, a)) call.run(reward_pixels_forward_kernel());
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
  call.choose(true);
  a.low = low;
  a.high = high;
  if (!DIFFPP_ON_CUDA(images, reward_pixels_backward, a)) call.run(reward_pixels_backward_kernel());
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

#if defined(DIFFPP_CUDA)
STABLE_TORCH_LIBRARY_IMPL(diffpp_fast, CUDA, m) {
  m.impl("reward_pixels", TORCH_BOX(&forward));
  m.impl("reward_pixels_backward", TORCH_BOX(&backward));
}
#endif

}  // namespace diffpp
