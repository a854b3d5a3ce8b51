// Between torch's stable ABI and the kernels: what a binding needs to check, lay out and run.
//
// A binding file holds the schemas of its operators in torch.ops.diffpp_fast, for every device, and their implementation on the
// CPU; shapes of results (fakes) are in the module of the same name in diffpp_fast/kernels/native. In schemas, `noise` is
// eps itself or the int64 [B] sample numbers of an address (seed, stream), and seed holds the bits of an unsigned number. A
// result that was not asked for comes back as a tensor without elements.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "../cpu/data.h"

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
  Result(const Tensor& like, const Order& order) : Result(torch::stable::empty_like(like), order, like.scalar_type()) {}

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

inline Tensor empty_vector(int64_t n, ScalarType dtype, const Tensor& beside) {
  return torch::stable::empty({&n, 1}, dtype, std::nullopt, beside.device());
}

// Uninitialised memory for one call. What small tensors on the CPU need is on the stack, for an allocation costs as much as
// their work; on GPUs torch keeps it until the kernels that were enqueued are through.
class Workspace {
 public:
  Workspace(int64_t bytes, const Tensor& beside) {
    const int64_t numbers = (bytes + 7) / 8;
    if (numbers > kSmall || !beside.is_cpu()) tensor_ = empty_vector(numbers, ScalarType::Double, beside);
    data_ = tensor_.has_value() ? static_cast<char*>(tensor_->mutable_data_ptr()) : reinterpret_cast<char*>(small_);
  }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  void* at(int64_t byte) const { return data_ + byte; }
  double* doubles() const { return static_cast<double*>(at(0)); }

 private:
  static constexpr int64_t kSmall = 1024;
  double small_[kSmall];
  std::optional<Tensor> tensor_;
  char* data_;
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

// `noise` is eps itself, shaped as `like`, or the int64 [B] sample numbers of an address (seed, stream): then seed holds the
// bits of an unsigned number. Owns the copies that it needed.
class NoiseArgument {
 public:
  NoiseArgument(const char* op, const Tensor& noise, int64_t seed, int64_t stream, const Tensor& like, const Order& order)
      : tensor_(noise) {
    if (noise.scalar_type() == ScalarType::Long) {
      STD_TORCH_CHECK(
          noise.dim() == 1 && noise.size(0) == order.layout().batch, op, ": samples must have shape [B] = [",
          order.layout().batch, "]");
      if (!noise.is_contiguous()) tensor_ = torch::stable::contiguous(noise);
      view_.samples = static_cast<const int64_t*>(tensor_.const_data_ptr());
      view_.seed = static_cast<uint64_t>(seed);
      view_.stream = static_cast<uint32_t>(stream);
    } else {
      check_same_shape(op, "noise", noise, like);
      check_same_dtype(op, "noise", noise, like);
      tensor_ = order.of(noise);
      view_.stored = tensor_.const_data_ptr();
    }
  }

  const Noise& view() const { return view_; }

 private:
  Tensor tensor_;
  Noise view_;
};

// Runs a kernel's work items on torch's thread pool, at least `grain` of them per thread.
template <typename Arguments>
void run(void (*kernel)(const Arguments&, int64_t, int64_t), const Arguments& arguments, int64_t items, int64_t grain) {
  torch::stable::parallel_for(
      0, items, grain, [&](int64_t begin, int64_t end) { kernel(arguments, begin, end); });
}

// Chunks of a thread: fewer take less time than a second thread takes to wake up.
constexpr int64_t kChunksPerThread = 8;

}  // namespace diffpp
