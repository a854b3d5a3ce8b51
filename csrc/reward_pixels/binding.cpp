#include <algorithm>
#include <vector>

#include "../common/binding.h"
#include "arguments.h"

namespace diffpp::reward_pixels {
namespace {

void check_choice(const char* op, const char* name, int64_t choice, int64_t last) {
  STD_TORCH_CHECK(choice >= 0 && choice <= last, op, ": ", name, " must be in [0, ", last, "], got ", choice);
}

void check_images(const char* op, const Tensor& images) {
  dtype_of(op, "images", images);
  STD_TORCH_CHECK(
      images.dim() == 4 && images.size(1) > 0 && images.size(2) > 0 && images.size(3) > 0, op,
      ": images must have shape [B, C, H, W] with pixels");
}

// The options, which both directions take.
struct Preprocessing {
  int64_t size;
  const std::vector<double>& mean;
  const std::vector<double>& std;
  int64_t filter;
  bool antialias;
  int64_t fit;
  double low;
  double high;
  int64_t clamp;
};

// The part of the arguments that does not depend on the direction, checked. `order` is that of the call.
Arguments checked(const char* op, const Tensor& images, const Preprocessing& preprocessing, const Order& order) {
  const auto& [size, mean, std, filter, antialias, fit, low, high, clamp] = preprocessing;
  const auto channels = static_cast<size_t>(images.size(1));
  STD_TORCH_CHECK(size >= 1, op, ": size must be at least 1, got ", size);
  STD_TORCH_CHECK(
      mean.size() == channels && std.size() == channels, op, ": mean and std must have ", channels, " values");
  check_choice(op, "filter", filter, static_cast<int64_t>(Filter::bicubic));
  check_choice(op, "fit", fit, static_cast<int64_t>(Fit::stretch));
  check_choice(op, "clamp", clamp, static_cast<int64_t>(Clamp::none));
  const int64_t height = images.size(2), width = images.size(3);
  Arguments arguments{};
  arguments.height = {height, width, size, static_cast<Fit>(fit), static_cast<Filter>(filter), antialias};
  arguments.width = {width, height, size, static_cast<Fit>(fit), static_cast<Filter>(filter), antialias};
  arguments.wide = images.scalar_type() == ScalarType::Double;
  arguments.channels = images.size(1);
  arguments.inner = order.layout().channels;
  arguments.planes = images.size(0) * arguments.channels / arguments.inner;
  arguments.mean = mean.data();
  arguments.std = std.data();
  arguments.low = low;
  arguments.high = high;
  arguments.clamp = static_cast<Clamp>(clamp) != Clamp::none;
  STD_TORCH_CHECK(
      !images.is_cuda() || std::max({arguments.planes, height, width * arguments.inner}) <= UINT32_MAX, op,
      ": images with 2^32 or more planes, rows or elements of a row are not served on GPUs");
  return arguments;
}

// For cuda::Upload: never freed, for at the end of the process CUDA may be gone first.
const void* kept_copy(const void* bytes, int64_t size, const void* beside) {
  const int64_t numbers = size / static_cast<int64_t>(sizeof(int64_t)), stride = 1;
  const Tensor host = torch::stable::from_blob(
      const_cast<void*>(bytes), {&numbers, 1}, {&stride, 1},
      torch::stable::Device(torch::headeronly::DeviceType::CPU), ScalarType::Long);
  auto* const memory = new Tensor(empty_vector(numbers, ScalarType::Long, *static_cast<const Tensor*>(beside)));
  // Waits until it is there: later calls may be on other streams.
  torch::stable::copy_(*memory, host);
  return memory->const_data_ptr();
}

void resample(const Arguments& arguments, const Tensor& images) {
  if (kCuda && images.is_cuda()) {
    const GpuStream stream(images);
    cuda::run(arguments, {kept_copy, &images, images.get_device_index()}, stream);
  } else {
    cpu::run(arguments, pool());
  }
}

// images [B, C, H, W] -> [B, C, size, size] in `dtype`, channels_last if images are.
Tensor resized(
    const Tensor& images, int64_t size, std::vector<double> mean, std::vector<double> std, int64_t filter,
    bool antialias, int64_t fit, double low, double high, int64_t clamp, ScalarType dtype) {
  constexpr auto op = "reward_pixels";
  check_images(op, images);
  const Order order(images, kTile);
  Arguments arguments =
      checked(op, images, {size, mean, std, filter, antialias, fit, low, high, clamp}, order);
  const Tensor ordered = order.of(images);
  const int64_t sizes[] = {images.size(0), images.size(1), size, size};
  const bool channels_last = !images.is_contiguous() && is_channels_last(images);
  const Tensor empty = torch::stable::empty(
      {sizes, 4}, dtype, std::nullopt, images.device(), std::nullopt,
      channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  Result pixels(empty, order, dtype);
  arguments.from = ordered.const_data_ptr();
  arguments.from_dtype = dtype_of(op, "images", images);
  arguments.to = pixels.data();
  arguments.to_dtype = dtype_of(op, "the result", empty);
  resample(arguments, images);
  return pixels.finish();
}

// grad_output [B, C, size, size], images [B, C, H, W] -> the gradient of the images, like them.
Tensor gradient(
    const Tensor& grad_output, const Tensor& images, int64_t size, std::vector<double> mean, std::vector<double> std,
    int64_t filter, bool antialias, int64_t fit, double low, double high, int64_t clamp) {
  constexpr auto op = "reward_pixels_backward";
  check_images(op, images);
  const Order order(images, kTile);
  Arguments arguments =
      checked(op, images, {size, mean, std, filter, antialias, fit, low, high, clamp}, order);
  STD_TORCH_CHECK(
      grad_output.dim() == 4 && grad_output.size(0) == images.size(0) && grad_output.size(1) == images.size(1) &&
          grad_output.size(2) == size && grad_output.size(3) == size,
      op, ": grad_output must have shape [B, C, size, size]");
  const bool hard = static_cast<Clamp>(clamp) == Clamp::hard;
  const Tensor grad = order.of(grad_output);
  // Elsewhere the images are not read.
  const Tensor ordered = hard ? order.of(images) : images;
  Result grad_images(images, order);
  arguments.adjoint = true;
  arguments.from = grad.const_data_ptr();
  arguments.from_dtype = dtype_of(op, "grad_output", grad_output);
  arguments.to = grad_images.data();
  arguments.to_dtype = dtype_of(op, "images", images);
  arguments.images = hard ? ordered.const_data_ptr() : nullptr;
  resample(arguments, images);
  return grad_images.finish();
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(TORCH_EXTENSION_NAME, m) {
  m.def(
      "reward_pixels(Tensor images, int size, float[] mean, float[] std, int filter, bool antialias, int fit, "
      "float low, float high, int clamp, ScalarType dtype) -> Tensor");
  m.def(
      "reward_pixels_backward(Tensor grad_output, Tensor images, int size, float[] mean, float[] std, int filter, "
      "bool antialias, int fit, float low, float high, int clamp) -> Tensor");
}

DIFFPP_ON_EVERY_DEVICE(m) {
  m.impl("reward_pixels", TORCH_BOX(&resized));
  m.impl("reward_pixels_backward", TORCH_BOX(&gradient));
}

}  // namespace diffpp::reward_pixels
