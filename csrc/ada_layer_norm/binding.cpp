#include "../common/binding.h"
#include "arguments.h"

namespace diffpp::ada_layer_norm {
namespace {

Shape shape_of(const char* op, const Tensor& x) {
  STD_TORCH_CHECK(x.dim() >= 2, op, ": x must have shape [B, ..., D], got ", x.dim(), " dimensions");
  const int64_t width = x.size(x.dim() - 1);
  STD_TORCH_CHECK(width > 0, op, ": a row of x has no elements");
  int64_t rows = 1;
  for (int64_t axis = 1; axis < x.dim() - 1; ++axis) rows *= x.size(axis);
  return {x.size(0), rows, width};
}

// A [B, D] argument. Owns the copy that it needed.
class Modulation {
 public:
  Modulation(const char* op, const char* name, const Tensor& values, const Shape& shape, Dtype dtype)
      : tensor_(values) {
    STD_TORCH_CHECK(
        values.dim() == 2 && values.size(0) == shape.batch && values.size(1) == shape.width, op, ": ", name,
        " must have shape [B, D] = [", shape.batch, ", ", shape.width, "]");
    const Dtype own = dtype_of(op, name, values);
    STD_TORCH_CHECK(
        (own == Dtype::float64) == (dtype == Dtype::float64), op, ": ", name, " and x must both be float64, or neither");
    if (shape.width > 1 && values.stride(1) != 1) tensor_ = torch::stable::contiguous(values);
    view_ = {tensor_.const_data_ptr(), own, tensor_.stride(0)};
  }

  const PerColumn& view() const { return view_; }

 private:
  Tensor tensor_;
  PerColumn view_;
};

// x [B, ..., D], scale and shift [B, D] -> y like x; mean and rstd [B, rows] in the compute dtype.
std::tuple<Tensor, Tensor, Tensor> outputs(const Tensor& x, const Tensor& scale, const Tensor& shift, double eps) {
  constexpr auto op = "ada_layer_norm";
  const Shape shape = shape_of(op, x);
  const Dtype dtype = dtype_of(op, "x", x);
  const Tensor ordered = dense(x);
  const Modulation scales(op, "scale", scale, shape, dtype), shifts(op, "shift", shift, shape, dtype);
  Tensor y = uninitialised_like(x);
  const Tensor written = y.is_contiguous() ? y : uninitialised_like(ordered);
  prefer_huge_pages(written);
  Tensor mean = empty_matrix(shape.batch, shape.rows, compute_dtype(dtype), x);
  Tensor rstd = empty_matrix(shape.batch, shape.rows, compute_dtype(dtype), x);
  const Forward arguments{
      .shape = shape,
      .dtype = dtype,
      .eps = eps,
      .x = ordered.const_data_ptr(),
      .scale = scales.view(),
      .shift = shifts.view(),
      .y = written.mutable_data_ptr(),
      .mean = mean.mutable_data_ptr(),
      .rstd = rstd.mutable_data_ptr()};
  cpu::forward(arguments, pool());
  if (written.get() != y.get()) torch::stable::copy_(y, written);
  return {y, mean, rstd};
}

void check_saved(const char* op, const char* name, const Tensor& saved, const Shape& shape, Dtype dtype) {
  STD_TORCH_CHECK(
      saved.dim() == 2 && saved.size(0) == shape.batch && saved.size(1) == shape.rows &&
          saved.scalar_type() == compute_dtype(dtype) && saved.is_contiguous(),
      op, ": ", name, " must be as ada_layer_norm returned it");
}

// The gradients of x, scale and shift, each where needed.
std::tuple<Tensor, Tensor, Tensor> gradients(
    const Tensor& grad_output, const Tensor& x, const Tensor& mean, const Tensor& rstd, const Tensor& scale,
    bool needs_x, bool needs_scale, bool needs_shift) {
  constexpr auto op = "ada_layer_norm_backward";
  const Shape shape = shape_of(op, x);
  const Dtype dtype = dtype_of(op, "x", x);
  check_same_shape(op, "grad_output", grad_output, x);
  check_same_dtype(op, "grad_output", grad_output, x);
  check_saved(op, "mean", mean, shape, dtype);
  check_saved(op, "rstd", rstd, shape, dtype);
  const Tensor ordered = dense(x), ordered_grad = dense(grad_output);
  const Modulation scales(op, "scale", scale, shape, dtype);
  Tensor grad_x = needs_x ? uninitialised_like(x) : empty_vector(0, x.scalar_type(), x);
  const Tensor written = grad_x.is_contiguous() ? grad_x : uninitialised_like(ordered);
  prefer_huge_pages(written);
  const auto modulation = [&](bool needed) {
    return needed ? empty_matrix(shape.batch, shape.width, scale.scalar_type(), x)
                  : empty_vector(0, scale.scalar_type(), x);
  };
  const Tensor grad_scale = modulation(needs_scale), grad_shift = modulation(needs_shift);
  const Backward arguments{
      .shape = shape,
      .dtype = dtype,
      .grad_output = ordered_grad.const_data_ptr(),
      .x = ordered.const_data_ptr(),
      .mean = mean.const_data_ptr(),
      .rstd = rstd.const_data_ptr(),
      .scale = scales.view(),
      .grad_x = needs_x ? written.mutable_data_ptr() : nullptr,
      .grad_scale = needs_scale ? grad_scale.mutable_data_ptr() : nullptr,
      .grad_shift = needs_shift ? grad_shift.mutable_data_ptr() : nullptr};
  cpu::backward(arguments, pool());
  if (written.get() != grad_x.get()) torch::stable::copy_(grad_x, written);
  return {grad_x, grad_scale, grad_shift};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(TORCH_EXTENSION_NAME, m) {
  m.def("ada_layer_norm(Tensor x, Tensor scale, Tensor shift, float eps) -> (Tensor, Tensor, Tensor)");
  m.def(
      "ada_layer_norm_backward(Tensor grad_output, Tensor x, Tensor mean, Tensor rstd, Tensor scale, bool needs_x,"
      " bool needs_scale, bool needs_shift) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(TORCH_EXTENSION_NAME, CPU, m) {
  m.impl("ada_layer_norm", TORCH_BOX(&outputs));
  m.impl("ada_layer_norm_backward", TORCH_BOX(&gradients));
}

}  // namespace diffpp::ada_layer_norm
