// Between torch's stable ABI and the kernels: what a binding needs to check, lay out and run.
//
// A binding file holds the schemas of its operators in torch.ops.diffpp_fast and their implementation, one for all devices that
// they serve; shapes of results (fakes) are in the Python package. In schemas, `noise` is eps itself or the int64 [B] sample
// numbers of an address (seed, stream), seed holds the bits of an unsigned number, and `prediction_type` is an index into
// PREDICTION_TYPES: a string argument would leak, since the headers of torch's stable ABI (2.13's, too) never free their copy
// of it. A result that was not asked for comes back as a tensor without elements.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#if defined(DIFFPP_CUDA)
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#endif

#include "kernel.h"

// The operators' namespace in torch.ops. Libraries that are compiled with other names live side by side in a process.
#if !defined(TORCH_EXTENSION_NAME)
#define TORCH_EXTENSION_NAME diffpp_fast
#endif

namespace diffpp {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The kernel dtype of a floating-point tensor; other dtypes are refused in the name of the operator.
inline Dtype dtype_of(const char* op, const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Dtype::float32;
    case ScalarType::BFloat16: return Dtype::bfloat16;
    case ScalarType::Half: return Dtype::float16;
    case ScalarType::Double: return Dtype::float64;
    default:
      STD_TORCH_CHECK(
          false, op, ": ", name, " must be float32, bfloat16, float16 or float64, got ",
          torch::headeronly::toString(tensor.scalar_type()));
  }
}

// The dtype of the arithmetic and of statistics.
inline ScalarType compute_dtype(Dtype dtype) {
  return dtype == Dtype::float64 ? ScalarType::Double : ScalarType::Float;
}

inline void check_same_shape(const char* op, const char* name, const Tensor& tensor, const Tensor& like) {
  bool same = tensor.dim() == like.dim();
  for (int64_t axis = 0; same && axis < like.dim(); ++axis) same = tensor.size(axis) == like.size(axis);
  STD_TORCH_CHECK(same, op, ": ", name, " must have the shape of the tensors before it");
}

inline void check_same_dtype(const char* op, const char* name, const Tensor& tensor, const Tensor& like) {
  STD_TORCH_CHECK(
      tensor.scalar_type() == like.scalar_type(), op, ": ", name, " is ",
      torch::headeronly::toString(tensor.scalar_type()), ", the tensors before it are ",
      torch::headeronly::toString(like.scalar_type()));
}

// Uninitialised. torch::stable::empty and empty_like look their operator up by name, in every call, and cost twice as much.
inline Tensor empty_strided(
    torch::headeronly::IntHeaderOnlyArrayRef sizes, torch::headeronly::IntHeaderOnlyArrayRef strides, ScalarType dtype,
    const Tensor& beside) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  int32_t type = 0;
  int32_t index = 0;
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(beside.get(), &type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(beside.get(), &index));
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), to<int32_t>(from(dtype)), type, index, &made));
  return Tensor(made);
}

inline Tensor empty_vector(int64_t n, ScalarType dtype, const Tensor& beside) {
  const int64_t stride = 1;
  return empty_strided({&n, 1}, {&stride, 1}, dtype, beside);
}

inline Tensor empty_matrix(int64_t rows, int64_t columns, ScalarType dtype, const Tensor& beside) {
  const int64_t sizes[] = {rows, columns};
  const int64_t strides[] = {columns > 1 ? columns : 1, 1};
  return empty_strided({sizes, 2}, {strides, 2}, dtype, beside);
}

inline Tensor dense(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// Whether [B, C, ...] is dense with the channels innermost.
inline bool is_channels_last(const Tensor& tensor) {
  if (tensor.dim() != 4 && tensor.dim() != 5) return false;
  int64_t expected = tensor.size(1);
  if (expected != 1 && tensor.stride(1) != 1) return false;
  for (int64_t axis = tensor.dim() - 1; axis != 1; axis = axis == 2 ? 0 : axis - 1) {
    if (tensor.size(axis) != 1 && tensor.stride(axis) != expected) return false;
    expected *= tensor.size(axis);
    if (axis == 0) break;
  }
  return true;
}

// What torch.empty_like returns, which keeps the strides of a tensor that fills its memory.
inline Tensor uninitialised_like(const Tensor& like) {
  if (like.numel() == 0 || !(like.is_contiguous() || is_channels_last(like))) return torch::stable::empty_like(like);
  return empty_strided(like.sizes(), like.strides(), like.scalar_type(), like);
}

// The order in which a call works: that of its first tensor if kernels know it, else row-major. Other tensors are copied into
// this order where they are in another.
class Order {
 public:
  // `most_channels` is what the kernel takes in channels_last; a chunk holds whole pixels.
  explicit Order(const Tensor& like, int64_t most_channels = kChunk) : dim_(like.dim()) {
    int64_t sample = 1;
    for (int64_t axis = 1; axis < dim_; ++axis) sample *= like.size(axis);
    channels_last_ = !like.is_contiguous() && is_channels_last(like) && like.size(1) <= most_channels;
    const int64_t channels = channels_last_ ? like.size(1) : 1;
    layout_ = {like.size(0), channels, sample / channels};
  }

  const Layout& layout() const { return layout_; }

  bool holds(const Tensor& tensor) const { return channels_last_ ? is_channels_last(tensor) : tensor.is_contiguous(); }

  // The tensor itself, or a copy in this order.
  Tensor of(const Tensor& tensor) const {
    return holds(tensor) ? tensor : torch::stable::contiguous(tensor, memory_format());
  }

  // Uninitialised, shaped as `like`, in this order.
  Tensor empty(const Tensor& like, ScalarType dtype) const {
    return torch::stable::empty(like.sizes(), dtype, std::nullopt, like.device(), std::nullopt, memory_format());
  }

 private:
  MemoryFormat memory_format() const {
    if (!channels_last_) return MemoryFormat::Contiguous;
    return dim_ == 4 ? MemoryFormat::ChannelsLast : MemoryFormat::ChannelsLast3d;
  }

  int64_t dim_;
  bool channels_last_;
  Layout layout_;
};

// Asks for huge pages under a large tensor that is about to be written. From 32 MiB on, malloc takes memory from the
// system for every tensor anew, and to take it in pages of 4 KiB costs several times what writing it does. A hint: it
// may be refused.
inline void prefer_huge_pages([[maybe_unused]] const Tensor& tensor) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = uintptr_t{1} << 21;
  constexpr uintptr_t large = uintptr_t{1} << 25;
  const uintptr_t bytes = static_cast<uintptr_t>(tensor.numel()) * tensor.element_size();
  if (bytes < large || !tensor.is_cpu()) return;
  const auto data = reinterpret_cast<uintptr_t>(tensor.mutable_data_ptr());
  const uintptr_t first = (data + page - 1) / page * page;
  const uintptr_t end = (data + bytes) / page * page;
  madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#endif
}

// A result in a memory format of its own (that of `like`), written by a kernel in the order of the call.
class Result {
 public:
  Result(const Tensor& like, const Order& order) : Result(uninitialised_like(like), order, like.scalar_type()) {}

  // `result`, uninitialised, of this dtype.
  Result(Tensor result, const Order& order, ScalarType dtype)
      : result_(std::move(result)), written_(order.holds(result_) ? result_ : order.empty(result_, dtype)) {
    prefer_huge_pages(written_);
  }

  void* data() const { return written_.mutable_data_ptr(); }

  Tensor finish() {
    if (written_.get() != result_.get()) torch::stable::copy_(result_, written_);
    return result_;
  }

 private:
  Tensor result_;
  Tensor written_;
};

inline PerSample per_sample(const char* op, const char* name, const Tensor& values, int64_t batch) {
  STD_TORCH_CHECK(
      values.dim() == 1 && values.size(0) == batch, op, ": ", name, " must have shape [B] = [", batch, "]");
  return {values.const_data_ptr(), dtype_of(op, name, values), values.stride(0)};
}

inline PerSample per_sample(
    const char* op, const char* name, const std::optional<Tensor>& values, int64_t batch) {
  return values.has_value() ? per_sample(op, name, *values, batch) : PerSample{};
}

// Noise as schemas have it.
struct NoiseInput {
  const Tensor& noise;
  int64_t seed;
  int64_t stream;
};

// Noise as kernels take it. Owns the copies that it needed.
class OrderedNoise {
 public:
  OrderedNoise(const char* op, const NoiseInput& input, const Tensor& like, const Order& order) : tensor_(input.noise) {
    if (tensor_.scalar_type() == ScalarType::Long) {
      STD_TORCH_CHECK(
          tensor_.dim() == 1 && tensor_.size(0) == order.layout().batch, op, ": samples must have shape [B] = [",
          order.layout().batch, "]");
      if (!tensor_.is_contiguous()) tensor_ = torch::stable::contiguous(tensor_);
      const auto* samples = static_cast<const int64_t*>(tensor_.const_data_ptr());
      view_ = Noise::drawn(samples, static_cast<uint64_t>(input.seed), static_cast<uint32_t>(input.stream));
    } else {
      check_same_shape(op, "noise", tensor_, like);
      check_same_dtype(op, "noise", tensor_, like);
      tensor_ = order.of(tensor_);
      view_.stored = tensor_.const_data_ptr();
    }
  }

  const Noise& view() const { return view_; }

 private:
  Tensor tensor_;
  Noise view_;
};

// The target of a prediction as schemas have it.
struct TargetInput {
  const Tensor& x0;
  NoiseInput noise;
  const Tensor& alpha;
  const Tensor& sigma;
  int64_t prediction_type;
};

// The target as kernels take it. Owns the copies that it needed; what the target does not hold is not copied.
class OrderedTarget {
 public:
  OrderedTarget(const char* op, const TargetInput& input, const Tensor& like, const Order& order) : x0_(input.x0) {
    STD_TORCH_CHECK(
        input.prediction_type >= 0 && input.prediction_type <= static_cast<int64_t>(Prediction::sample), op,
        ": unknown prediction type number ", input.prediction_type);
    view_.prediction = static_cast<Prediction>(input.prediction_type);
    check_same_shape(op, "x0", x0_, like);
    check_same_dtype(op, "x0", x0_, like);
    const int64_t batch = order.layout().batch;
    view_.alpha = per_sample(op, "alpha", input.alpha, batch);
    view_.sigma = per_sample(op, "sigma", input.sigma, batch);
    if (Target::holds_x0(view_.prediction)) {
      x0_ = order.of(x0_);
      view_.x0 = x0_.const_data_ptr();
    }
    if (Target::holds_noise(view_.prediction)) {
      noise_.emplace(op, input.noise, like, order);
      view_.noise = noise_->view();
    }
  }

  const Target& view() const { return view_; }

 private:
  Tensor x0_;
  std::optional<OrderedNoise> noise_;
  Target view_;
};

// Three network outputs and the target as schemas have them.
struct OutputsInput {
  const Tensor& fake;
  const Tensor& cond;
  const std::optional<Tensor>& uncond;
  double guidance_scale;
  std::optional<TargetInput> target;
};

// Outputs and target as kernels take them, in the order of `fake`. Owns the copies that it needed.
class OrderedOutputs {
 public:
  OrderedOutputs(const char* op, const OutputsInput& input)
      : order_(input.fake), fake_(order_.of(input.fake)), cond_(order_.of(input.cond)) {
    view_ = {};
    view_.dtype = dtype_of(op, "fake", input.fake);
    view_.layout = order_.layout();
    view_.fake = fake_.const_data_ptr();
    check_same_shape(op, "cond", input.cond, input.fake);
    check_same_dtype(op, "cond", input.cond, input.fake);
    view_.cond = cond_.const_data_ptr();
    if (input.uncond.has_value()) {
      check_same_shape(op, "uncond", *input.uncond, input.fake);
      check_same_dtype(op, "uncond", *input.uncond, input.fake);
      uncond_ = order_.of(*input.uncond);
      view_.uncond = uncond_->const_data_ptr();
    }
    view_.guidance_scale = input.guidance_scale;
    view_.has_target = input.target.has_value();
    if (view_.has_target) {
      target_.emplace(op, *input.target, input.fake, order_);
      view_.target = target_->view();
    }
  }

  const Order& order() const { return order_; }
  const Outputs& view() const { return view_; }

 private:
  Order order_;
  Tensor fake_;
  Tensor cond_;
  std::optional<Tensor> uncond_;
  std::optional<OrderedTarget> target_;
  Outputs view_;
};

// A result that may not be asked for: then a tensor without elements.
class OptionalResult {
 public:
  OptionalResult(bool needed, const Tensor& like, const Order& order) {
    if (needed) {
      result_.emplace(like, order);
    } else {
      nothing_ = empty_vector(0, like.scalar_type(), like);
    }
  }

  void* data() const { return result_.has_value() ? result_->data() : nullptr; }
  Tensor finish() { return result_.has_value() ? result_->finish() : nothing_; }

 private:
  std::optional<Result> result_;
  Tensor nothing_;
};

// torch's threads.
inline const Pool& pool() {
  static constexpr Pool threads{
      [] { return static_cast<int64_t>(torch::stable::get_num_threads()); },
      [](int64_t items, int64_t grain, Pool::Work work, void* context) {
        torch::stable::parallel_for(
            0, items, grain, [&](int64_t begin, int64_t end) { work(begin, end, context); });
      }};
  return threads;
}

// Whether GPU kernels were compiled. A binding asks `kCuda && tensor.is_cuda()`: without them their names are not linked.
#if defined(DIFFPP_CUDA)
constexpr bool kCuda = true;
#else
constexpr bool kCuda = false;
#endif

// Bytes of a GPU for one call. torch keeps them until the kernels that were enqueued are through.
class GpuMemory {
 public:
  GpuMemory(int64_t bytes, const Tensor& beside) : tensor_(empty_vector((bytes + 7) / 8, ScalarType::Double, beside)) {}

  double* data() const { return static_cast<double*>(tensor_.mutable_data_ptr()); }

 private:
  Tensor tensor_;
};

// The device and current stream of a tensor, where kernels are enqueued while this lives.
class GpuStream {
 public:
#if defined(DIFFPP_CUDA)
  explicit GpuStream(const Tensor& on) : guard_(on.get_device_index()), stream_(current(on.get_device_index())) {}
  operator void*() const { return stream_; }

 private:
  // torch exports this function from its CUDA library alone, which is not there, and not linked, where torch was built for the
  // CPU.
  static void* current(int32_t device) {
    using Function = AOTITorchError (*)(int32_t, void**);
    static const auto function = [] {
      void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
      return library == nullptr ? nullptr
                                : reinterpret_cast<Function>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
    }();
    STD_TORCH_CHECK(function != nullptr, "diffpp_fast: this torch has no CUDA");
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(function(device, &stream));
    return stream;
  }

  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_;
#else
  explicit GpuStream(const Tensor&) {}
  operator void*() const { return nullptr; }
#endif
};

}  // namespace diffpp

// Followed by a body of m.impl(...): registers those functions for the CPU, and for GPUs where kernels for them were compiled.
#if defined(DIFFPP_CUDA)
#define DIFFPP_ON_EVERY_DEVICE(m)                                                         \
  template <typename Library>                                                            \
  static void implement(Library& m);                                                     \
  STABLE_TORCH_LIBRARY_IMPL(TORCH_EXTENSION_NAME, CPU, library) { implement(library); }  \
  STABLE_TORCH_LIBRARY_IMPL(TORCH_EXTENSION_NAME, CUDA, library) { implement(library); } \
  template <typename Library>                                                            \
  static void implement(Library& m)
#else
#define DIFFPP_ON_EVERY_DEVICE(m) STABLE_TORCH_LIBRARY_IMPL(TORCH_EXTENSION_NAME, CPU, m)
#endif
