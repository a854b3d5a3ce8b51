#include "../cpu/group_norm_silu.h"

#include <tuple>

#include "cuda.h"
#include "tensor.h"

namespace diffpp {
namespace {

using std::optional;

GroupNormShape shape_of(const char* op, const Tensor& x, int64_t groups, const Order& order) {
  const Layout& layout = order.layout();
  const int64_t channels = x.size(1);
  STD_TORCH_CHECK(
      groups >= 1 && channels % groups == 0, op, ": num_groups must divide the ", channels, " channels, got ", groups);
  STD_TORCH_CHECK(layout.sample() > 0, op, ": a sample of x has no elements");
  const int64_t pixels = layout.sample() / channels;
  // One pixel is as good as channels_last, and saves a line for each channel.
  const bool channels_last = layout.channels > 1 || (pixels == 1 && channels <= kMostChannels);
  return {layout.batch, channels, pixels, groups, channels_last};
}

void check_dim(const char* op, const Tensor& x) {
  STD_TORCH_CHECK(x.dim() >= 2, op, ": x must have shape [B, C, ...], got ", x.dim(), " dimensions");
}

PerSample per_channel(const char* op, const char* name, const optional<Tensor>& values, int64_t channels) {
  if (!values.has_value()) return {};
  STD_TORCH_CHECK(
      values->dim() == 1 && values->size(0) == channels, op, ": ", name, " must have shape [C] = [", channels, "]");
  return {values->const_data_ptr(), dtype_of(op, name, *values), values->stride(0)};
}

Tensor empty_matrix(int64_t rows, int64_t columns, ScalarType dtype, const Tensor& beside) {
  const int64_t sizes[] = {rows, columns};
  return torch::stable::empty({sizes, 2}, dtype, std::nullopt, beside.device());
}

// Lines go to threads whole if that keeps all threads busy, or if there is work for one alone: a line that is done in
// all stages before the next begins comes from memory once.
bool by_line(const GroupNormShape& shape) {
  const int64_t elements = shape.batch * shape.channels * shape.pixels;
  return elements <= kChunksPerThread * kChunk || shape.group_pieces().lines >= 4 * torch::stable::get_num_threads();
}

// The work items that make a thread worth waking, if one goes through so many elements.
int64_t grain(int64_t elements) {
  constexpr int64_t enough = kChunksPerThread * kChunk;
  return elements <= 1 ? enough : elements < enough ? enough / elements : 1;
}

int64_t grain(const Pieces& pieces) { return grain(pieces.line < pieces.length ? pieces.line : pieces.length); }

int64_t bytes_for_cpu(const GroupNormForward& a) {
  return a.shape.batch * a.shape.group_pieces().per_line * 2 * a.shape.groups * static_cast<int64_t>(sizeof(double));
}

void run_on_cpu(const GroupNormForward& arguments) {
  const GroupNormShape& shape = arguments.shape;
  const Pieces pieces = shape.group_pieces();
  if (by_line(shape)) {
    run(group_norm_forward_kernel(), arguments, pieces.lines, grain(pieces.line));
  } else {
    const Pieces outputs = shape.channel_pieces();
    run(group_norm_statistics_kernel(), arguments, pieces.count(), grain(pieces));
    run(group_norm_moments_kernel(), arguments, shape.batch * shape.groups, grain(pieces.per_line));
    run(group_norm_activate_kernel(), arguments, outputs.count(), grain(outputs));
  }
}

// x [B, C, ...], weight [C], bias [C] -> y like x; mean and rstd [B, num_groups] in the compute dtype.
std::tuple<Tensor, Tensor, Tensor> forward(
    const Tensor& x, int64_t num_groups, const optional<Tensor>& weight, const optional<Tensor>& bias, double eps,
    bool silu) {
  constexpr auto op = "group_norm_silu";
  check_dim(op, x);
  const Dtype dtype = dtype_of(op, "x", x);
  const Order order(x, kMostChannels);
  const GroupNormShape shape = shape_of(op, x, num_groups, order);
  const Tensor ordered = order.of(x);
  Result y(x, order);
  Tensor mean = empty_matrix(shape.batch, num_groups, compute_dtype(dtype), x);
  Tensor rstd = empty_matrix(shape.batch, num_groups, compute_dtype(dtype), x);
  GroupNormForward arguments{
      {shape, dtype, silu, ordered.const_data_ptr(), per_channel(op, "weight", weight, shape.channels),
       per_channel(op, "bias", bias, shape.channels)},
      eps,
      y.data(),
      mean.mutable_data_ptr(),
      rstd.mutable_data_ptr(),
      nullptr};
  const Workspace partials(DIFFPP_FOR_CUDA(x, group_norm_workspace(arguments), bytes_for_cpu(arguments)), x);
  arguments.partials = partials.doubles();
  if (!DIFFPP_ON_CUDA(x, group_norm_forward, arguments)) run_on_cpu(arguments);
  return {y.finish(), mean, rstd};
}

void check_saved(const char* op, const char* name, const Tensor& saved, Dtype dtype) {
  STD_TORCH_CHECK(
      saved.dim() == 2 && saved.scalar_type() == compute_dtype(dtype) && saved.is_contiguous(), op, ": ", name,
      " must be as group_norm_silu returned it");
}

// Of the workspace: partials, sums and terms, one after the other.
struct CpuBytes {
  explicit CpuBytes(const GroupNormBackward& a) {
    const GroupNormShape& shape = a.shape;
    const int64_t pair = 2 * (a.dtype == Dtype::float64 ? sizeof(double) : sizeof(float));
    partials = shape.batch * shape.channel_pieces().per_line * shape.channels * pair;
    sums = shape.batch * shape.channels * pair;
    all = partials + sums + shape.batch * shape.groups * pair;
  }

  int64_t partials, sums, all;
};

void run_on_cpu(const GroupNormBackward& arguments) {
  const GroupNormShape& shape = arguments.shape;
  const Pieces pieces = shape.channel_pieces();
  if (by_line(shape)) {
    const Pieces lines = shape.group_pieces();
    run(group_norm_backward_kernel(), arguments, lines.lines, grain(lines.line));
  } else {
    run(group_norm_sums_kernel(), arguments, pieces.count(), grain(pieces));
    run(group_norm_terms_kernel(), arguments, shape.batch * shape.groups, grain(pieces.per_line * shape.per_group()));
    if (arguments.grad_x != nullptr)
      run(group_norm_input_gradient_kernel(), arguments, pieces.count(), grain(pieces));
  }
  if (arguments.grad_weight != nullptr || arguments.grad_bias != nullptr)
    run(group_norm_parameter_gradients_kernel(), arguments, shape.channels, grain(shape.batch));
}

// The gradients of x, weight and bias, each where needed.
std::tuple<Tensor, Tensor, Tensor> backward(
    const Tensor& grad_output, const Tensor& x, const Tensor& mean, const Tensor& rstd, const optional<Tensor>& weight,
    const optional<Tensor>& bias, bool silu, bool needs_x, bool needs_weight, bool needs_bias) {
  constexpr auto op = "group_norm_silu_backward";
  check_dim(op, x);
  const Dtype dtype = dtype_of(op, "x", x);
  check_same_shape(op, "grad_output", grad_output, x);
  check_same_dtype(op, "grad_output", grad_output, x);
  check_saved(op, "mean", mean, dtype);
  check_saved(op, "rstd", rstd, dtype);
  check_same_shape(op, "rstd", rstd, mean);
  STD_TORCH_CHECK(mean.size(0) == x.size(0), op, ": mean must have the batch of x");
  const Order order(x, kMostChannels);
  const int64_t groups = mean.size(1);
  const GroupNormShape shape = shape_of(op, x, groups, order);
  const Tensor ordered_x = order.of(x);
  const Tensor ordered_grad = order.of(grad_output);
  optional<Result> grad_x;
  if (needs_x) grad_x.emplace(x, order);
  const auto parameter = [&](const optional<Tensor>& values, bool needed) {
    return needed && values.has_value() ? empty_vector(shape.channels, values->scalar_type(), x)
                                        : empty_vector(0, x.scalar_type(), x);
  };
  const Tensor grad_weight = parameter(weight, needs_weight);
  const Tensor grad_bias = parameter(bias, needs_bias);
  const auto written = [](const Tensor& gradient) {
    return gradient.size(0) > 0 ? gradient.mutable_data_ptr() : nullptr;
  };
  GroupNormBackward arguments{
      {shape, dtype, silu, ordered_x.const_data_ptr(), per_channel(op, "weight", weight, shape.channels),
       per_channel(op, "bias", bias, shape.channels)},
      ordered_grad.const_data_ptr(),
      mean.const_data_ptr(),
      rstd.const_data_ptr(),
      nullptr,
      nullptr,
      nullptr,
      needs_x ? grad_x->data() : nullptr,
      written(grad_weight),
      written(grad_bias)};
  const CpuBytes cpu(arguments);
  const Workspace workspace(DIFFPP_FOR_CUDA(x, group_norm_workspace(arguments), cpu.all), x);
  arguments.partials = workspace.at(0);
  if (!DIFFPP_ON_CUDA(x, group_norm_backward, arguments)) {
    arguments.sums = workspace.at(cpu.partials);
    arguments.terms = workspace.at(cpu.partials + cpu.sums);
    run_on_cpu(arguments);
  }
  return {needs_x ? grad_x->finish() : empty_vector(0, x.scalar_type(), x), grad_weight, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(diffpp_fast, m) {
  m.def(
      "group_norm_silu(Tensor x, int num_groups, Tensor? weight, Tensor? bias, float eps, bool silu)"
      " -> (Tensor, Tensor, Tensor)");
  m.def(
      "group_norm_silu_backward(Tensor grad_output, Tensor x, Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias,"
      " bool silu, bool needs_x, bool needs_weight, bool needs_bias) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(diffpp_fast, CPU, m) {
  m.impl("group_norm_silu", TORCH_BOX(&forward));
  m.impl("group_norm_silu_backward", TORCH_BOX(&backward));
}

#if defined(DIFFPP_CUDA)
STABLE_TORCH_LIBRARY_IMPL(diffpp_fast, CUDA, m) {
  m.impl("group_norm_silu", TORCH_BOX(&forward));
  m.impl("group_norm_silu_backward", TORCH_BOX(&backward));
}
#endif

}  // namespace diffpp
