#include "../common/binding.h"
#include "arguments.h"

namespace diffpp::group_norm_silu {
namespace {

using std::optional;

Shape shape_of(const char* op, const Tensor& x, int64_t groups, const Order& order) {
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

PerSample per_sample_and_channel(const char* op, const optional<Tensor>& offset, const Tensor& x) {
  if (!offset.has_value()) return {};
  STD_TORCH_CHECK(
      offset->dim() == 2 && offset->size(0) == x.size(0) && offset->size(1) == x.size(1), op,
      ": offset must have shape [B, C] = [", x.size(0), ", ", x.size(1), "]");
  return {offset->const_data_ptr(), dtype_of(op, "offset", *offset), offset->stride(1)};
}

// a + b, in the dtype of a.
Tensor added(const Tensor& a, const Tensor& b) {
  return torch::stable::subtract(a, torch::stable::to(b, a.scalar_type()), -1.0);
}

// What kernels for GPUs normalise: they know no offset.
Tensor with_offset(const Tensor& x, const optional<Tensor>& offset) {
  per_sample_and_channel("group_norm_silu", offset, x);
  Tensor column = *offset;
  for (int64_t axis = 2; axis < x.dim(); ++axis) column = torch::stable::unsqueeze(column, axis);
  return added(x, column);
}

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// x [B, C, ...], residual like x, weight [C], bias [C], offset [B, C] -> y and x + residual like x; mean and rstd
// [B, num_groups] in the compute dtype.
Outputs outputs(
    const char* op, const Tensor& x, const optional<Tensor>& residual, int64_t num_groups,
    const optional<Tensor>& weight, const optional<Tensor>& bias, double eps, bool silu,
    const optional<Tensor>& offset) {
  check_dim(op, x);
  const Dtype dtype = dtype_of(op, "x", x);
  const Order order(x, kMostChannels);
  const Shape shape = shape_of(op, x, num_groups, order);
  const Tensor ordered = order.of(x);
  Result y(x, order);
  Tensor mean = empty_matrix(shape.batch, num_groups, compute_dtype(dtype), x);
  Tensor rstd = empty_matrix(shape.batch, num_groups, compute_dtype(dtype), x);
  Forward arguments{Inputs{
      .shape = shape,
      .dtype = dtype,
      .silu = silu,
      .x = ordered.const_data_ptr(),
      .weight = per_channel(op, "weight", weight, shape.channels),
      .bias = per_channel(op, "bias", bias, shape.channels),
      .offset = per_sample_and_channel(op, offset, x),
      .offset_row = offset.has_value() ? offset->stride(0) : 0}};
  arguments.eps = eps;
  arguments.y = y.data();
  arguments.mean = mean.mutable_data_ptr();
  arguments.rstd = rstd.mutable_data_ptr();
  Tensor ordered_residual = ordered;
  optional<Result> sum;
  if (residual.has_value()) {
    check_same_shape(op, "residual", *residual, x);
    check_same_dtype(op, "residual", *residual, x);
    ordered_residual = order.of(*residual);
    sum.emplace(x, order);
    arguments.residual = ordered_residual.const_data_ptr();
    arguments.sum = sum->data();
  }
  if (kCuda && x.is_cuda()) {
    const GpuMemory partials(cuda::bytes_of_partials(arguments), x);
    arguments.partials = partials.data();
    cuda::forward(arguments, GpuStream(x));
  } else {
    cpu::forward(arguments, pool());
  }
  return {y.finish(), sum.has_value() ? sum->finish() : x, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> outputs_of_x(
    const Tensor& x, int64_t num_groups, const optional<Tensor>& weight, const optional<Tensor>& bias, double eps,
    bool silu, const optional<Tensor>& offset) {
  constexpr auto op = "group_norm_silu";
  const bool before = kCuda && x.is_cuda() && offset.has_value();
  const auto [y, unused, mean, rstd] =
      before ? outputs(op, with_offset(x, offset), std::nullopt, num_groups, weight, bias, eps, silu, std::nullopt)
             : outputs(op, x, std::nullopt, num_groups, weight, bias, eps, silu, offset);
  return {y, mean, rstd};
}

Outputs outputs_of_sum(
    const Tensor& x, const Tensor& residual, int64_t num_groups, const optional<Tensor>& weight,
    const optional<Tensor>& bias, double eps, bool silu) {
  constexpr auto op = "group_norm_silu_of_sum";
  check_same_shape(op, "residual", residual, x);
  if (kCuda && x.is_cuda())
    return outputs(op, added(x, residual), std::nullopt, num_groups, weight, bias, eps, silu, std::nullopt);
  return outputs(op, x, residual, num_groups, weight, bias, eps, silu, std::nullopt);
}

void check_saved(const char* op, const char* name, const Tensor& saved, Dtype dtype) {
  STD_TORCH_CHECK(
      saved.dim() == 2 && saved.scalar_type() == compute_dtype(dtype) && saved.is_contiguous(), op, ": ", name,
      " must be as group_norm_silu returned it");
}

// The gradients of x, weight and bias, each where needed; grad_sum is added to that of x.
std::tuple<Tensor, Tensor, Tensor> gradients(
    const Tensor& grad_output, const optional<Tensor>& grad_sum, const Tensor& x, const Tensor& mean,
    const Tensor& rstd, const optional<Tensor>& weight, const optional<Tensor>& bias, const optional<Tensor>& offset,
    bool silu, bool needs_x, bool needs_weight, bool needs_bias) {
  constexpr auto op = "group_norm_silu_backward";
  if (grad_sum.has_value()) {
    check_same_shape(op, "grad_sum", *grad_sum, x);
    check_same_dtype(op, "grad_sum", *grad_sum, x);
  }
  if (kCuda && x.is_cuda() && (offset.has_value() || grad_sum.has_value())) {
    const Tensor normalised = offset.has_value() ? with_offset(x, offset) : x;
    const auto [grad_x, grad_weight, grad_bias] = gradients(
        grad_output, std::nullopt, normalised, mean, rstd, weight, bias, std::nullopt, silu, needs_x, needs_weight,
        needs_bias);
    return {needs_x && grad_sum.has_value() ? added(grad_x, *grad_sum) : grad_x, grad_weight, grad_bias};
  }
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
  const Shape shape = shape_of(op, x, groups, order);
  const Tensor ordered_x = order.of(x);
  const Tensor ordered_grad = order.of(grad_output);
  Tensor ordered_more = ordered_grad;
  if (grad_sum.has_value()) ordered_more = order.of(*grad_sum);
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
  Backward arguments{Inputs{
      .shape = shape,
      .dtype = dtype,
      .silu = silu,
      .x = ordered_x.const_data_ptr(),
      .weight = per_channel(op, "weight", weight, shape.channels),
      .bias = per_channel(op, "bias", bias, shape.channels),
      .offset = per_sample_and_channel(op, offset, x),
      .offset_row = offset.has_value() ? offset->stride(0) : 0}};
  arguments.grad_output = ordered_grad.const_data_ptr();
  arguments.grad_sum = grad_sum.has_value() ? ordered_more.const_data_ptr() : nullptr;
  arguments.mean = mean.const_data_ptr();
  arguments.rstd = rstd.const_data_ptr();
  arguments.grad_x = needs_x ? grad_x->data() : nullptr;
  arguments.grad_weight = written(grad_weight);
  arguments.grad_bias = written(grad_bias);
  if (kCuda && x.is_cuda()) {
    const GpuMemory partials(cuda::bytes_of_partials(arguments), x);
    arguments.partials = partials.data();
    cuda::backward(arguments, GpuStream(x));
  } else {
    cpu::backward(arguments, pool());
  }
  return {needs_x ? grad_x->finish() : empty_vector(0, x.scalar_type(), x), grad_weight, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(TORCH_EXTENSION_NAME, m) {
  m.def(
      "group_norm_silu(Tensor x, int num_groups, Tensor? weight, Tensor? bias, float eps, bool silu, Tensor? offset)"
      " -> (Tensor, Tensor, Tensor)");
  m.def(
      "group_norm_silu_of_sum(Tensor x, Tensor residual, int num_groups, Tensor? weight, Tensor? bias, float eps,"
      " bool silu) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "group_norm_silu_backward(Tensor grad_output, Tensor? grad_sum, Tensor x, Tensor mean, Tensor rstd,"
      " Tensor? weight, Tensor? bias, Tensor? offset, bool silu, bool needs_x, bool needs_weight, bool needs_bias)"
      " -> (Tensor, Tensor, Tensor)");
}

DIFFPP_ON_EVERY_DEVICE(m) {
  m.impl("group_norm_silu", TORCH_BOX(&outputs_of_x));
  m.impl("group_norm_silu_of_sum", TORCH_BOX(&outputs_of_sum));
  m.impl("group_norm_silu_backward", TORCH_BOX(&gradients));
}

}  // namespace diffpp::group_norm_silu
