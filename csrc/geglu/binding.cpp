#include <vector>

#include "../common/binding.h"
#include "arguments.h"

namespace diffpp::geglu {
namespace {

Shape shape_of(const char* op, const Tensor& x) {
  STD_TORCH_CHECK(
      x.dim() >= 1 && x.size(x.dim() - 1) % 2 == 0, op, ": the last dimension of x must be a multiple of 2");
  const int64_t width = x.size(x.dim() - 1);
  return {width > 0 ? x.numel() / width : 0, width / 2};
}

// x [..., 2 D] -> [..., D].
Tensor outputs(const Tensor& x) {
  constexpr auto op = "geglu";
  const Shape shape = shape_of(op, x);
  const Tensor ordered = dense(x);
  std::vector<int64_t> sizes;
  for (int64_t axis = 0; axis < x.dim(); ++axis) sizes.push_back(x.size(axis));
  sizes.back() = shape.half;
  Tensor y = torch::stable::empty({sizes.data(), sizes.size()}, x.scalar_type(), std::nullopt, x.device());
  prefer_huge_pages(y);
  const Forward arguments{
      .shape = shape, .dtype = dtype_of(op, "x", x), .x = ordered.const_data_ptr(), .y = y.mutable_data_ptr()};
  cpu::forward(arguments, pool());
  return y;
}

// grad_output [..., D], x [..., 2 D] -> the gradient of x, like x.
Tensor gradient(const Tensor& grad_output, const Tensor& x) {
  constexpr auto op = "geglu_backward";
  const Shape shape = shape_of(op, x);
  STD_TORCH_CHECK(
      grad_output.numel() == shape.rows * shape.half, op, ": grad_output must have half the elements of x");
  check_same_dtype(op, "grad_output", grad_output, x);
  const Tensor ordered = dense(x), ordered_grad = dense(grad_output);
  Tensor grad_x = uninitialised_like(x);
  const Tensor written = grad_x.is_contiguous() ? grad_x : uninitialised_like(ordered);
  prefer_huge_pages(written);
  const Backward arguments{
      .shape = shape,
      .dtype = dtype_of(op, "x", x),
      .grad_output = ordered_grad.const_data_ptr(),
      .x = ordered.const_data_ptr(),
      .grad_x = written.mutable_data_ptr()};
  cpu::backward(arguments, pool());
  if (written.get() != grad_x.get()) torch::stable::copy_(grad_x, written);
  return grad_x;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(TORCH_EXTENSION_NAME, m) {
  m.def("geglu(Tensor x) -> Tensor");
  m.def("geglu_backward(Tensor grad_output, Tensor x) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(TORCH_EXTENSION_NAME, CPU, m) {
  m.impl("geglu", TORCH_BOX(&outputs));
  m.impl("geglu_backward", TORCH_BOX(&gradient));
}

}  // namespace diffpp::geglu
