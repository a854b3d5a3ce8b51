#include "../common/binding.h"
#include "arguments.h"

namespace diffpp::noise {
namespace {

Tensor contiguous_samples(const char* op, const Tensor& samples) {
  STD_TORCH_CHECK(
      samples.scalar_type() == ScalarType::Long && samples.dim() == 1, op, ": samples must be int64 [B], got ",
      torch::headeronly::toString(samples.scalar_type()), " with ", samples.dim(), " dimensions");
  return samples.is_contiguous() ? samples : torch::stable::contiguous(samples);
}

Noise address(const Tensor& samples, int64_t seed, int64_t stream) {
  return Noise::drawn(
      static_cast<const int64_t*>(samples.const_data_ptr()), static_cast<uint64_t>(seed), static_cast<uint32_t>(stream));
}

// samples int64 [B] -> normals [B, count].
Tensor normal(const Tensor& samples, int64_t seed, int64_t stream, int64_t count, ScalarType dtype) {
  constexpr auto op = "normal";
  const Tensor ordered = contiguous_samples(op, samples);
  STD_TORCH_CHECK(count >= 0, op, ": count must not be negative, got ", count);
  const int64_t shape[] = {samples.size(0), count};
  Tensor result = torch::stable::empty({shape, 2}, dtype, std::nullopt, samples.device());
  const Normals arguments{
      .to = result.mutable_data_ptr(),
      .dtype = dtype_of(op, "the result", result),
      .layout = {shape[0], 1, count},
      .noise = address(ordered, seed, stream)};
  if (kCuda && samples.is_cuda()) {
    cuda::draw_normals(arguments, GpuStream(samples));
  } else {
    cpu::draw_normals(arguments, pool());
  }
  return result;
}

void draw(const Single& arguments, const Tensor& samples) {
  if (kCuda && samples.is_cuda()) {
    cuda::draw_single(arguments, GpuStream(samples));
  } else {
    cpu::draw_single(arguments, pool());
  }
}

// samples int64 [B] -> float32 [B] in [0, 1).
Tensor uniform(const Tensor& samples, int64_t seed, int64_t stream) {
  const Tensor ordered = contiguous_samples("uniform", samples);
  Tensor result = empty_vector(samples.size(0), ScalarType::Float, samples);
  Single arguments{};
  arguments.batch = samples.size(0);
  arguments.uniform = static_cast<float*>(result.mutable_data_ptr());
  arguments.noise = address(ordered, seed, stream);
  draw(arguments, samples);
  return result;
}

// samples int64 [B] -> int64 [B] in [low, low + range).
Tensor integers(const Tensor& samples, int64_t seed, int64_t stream, int64_t low, int64_t range) {
  constexpr auto op = "integers";
  const Tensor ordered = contiguous_samples(op, samples);
  STD_TORCH_CHECK(
      range > 0 && range <= (int64_t{1} << 32), op, ": range must be in [1, 2^32], got ", range);
  Tensor result = empty_vector(samples.size(0), ScalarType::Long, samples);
  Single arguments{};
  arguments.batch = samples.size(0);
  arguments.integers = static_cast<int64_t*>(result.mutable_data_ptr());
  arguments.low = low;
  arguments.range = static_cast<uint64_t>(range);
  arguments.noise = address(ordered, seed, stream);
  draw(arguments, samples);
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(TORCH_EXTENSION_NAME, m) {
  m.def("normal(Tensor samples, int seed, int stream, SymInt count, ScalarType dtype) -> Tensor");
  m.def("uniform(Tensor samples, int seed, int stream) -> Tensor");
  m.def("integers(Tensor samples, int seed, int stream, int low, int range) -> Tensor");
}

DIFFPP_ON_EVERY_DEVICE(m) {
  m.impl("normal", TORCH_BOX(&normal));
  m.impl("uniform", TORCH_BOX(&uniform));
  m.impl("integers", TORCH_BOX(&integers));
}

}  // namespace diffpp::noise
