#include "../common/binding.h"
#include "arguments.h"

namespace diffpp::add_noise {
namespace {

// x0 [B, ...], alpha [B], sigma [B] -> x_t like x0.
Tensor noisy(
    const Tensor& x0, const Tensor& alpha, const Tensor& sigma, const Tensor& noise, int64_t seed, int64_t stream) {
  constexpr auto op = "add_noise";
  const Order order(x0);
  const Tensor ordered = order.of(x0);
  const OrderedNoise eps(op, {noise, seed, stream}, x0, order);
  Result x_t(x0, order);
  const int64_t batch = order.layout().batch;
  const Forward arguments{
      .x0 = ordered.const_data_ptr(),
      .x_t = x_t.data(),
      .dtype = dtype_of(op, "x0", x0),
      .layout = order.layout(),
      .alpha = per_sample(op, "alpha", alpha, batch),
      .sigma = per_sample(op, "sigma", sigma, batch),
      .noise = eps.view()};
  if (kCuda && x0.is_cuda()) {
    cuda::forward(arguments, GpuStream(x0));
  } else {
    cpu::forward(arguments, pool());
  }
  return x_t.finish();
}

// grad_output [B, ...], alpha [B] -> the gradient of x0, like grad_output.
Tensor gradient(const Tensor& grad_output, const Tensor& alpha) {
  constexpr auto op = "add_noise_backward";
  const Order order(grad_output);
  const Tensor ordered = order.of(grad_output);
  Result grad_x0(grad_output, order);
  const Backward arguments{
      .grad_output = ordered.const_data_ptr(),
      .grad_x0 = grad_x0.data(),
      .dtype = dtype_of(op, "grad_output", grad_output),
      .layout = order.layout(),
      .alpha = per_sample(op, "alpha", alpha, order.layout().batch)};
  if (kCuda && grad_output.is_cuda()) {
    cuda::backward(arguments, GpuStream(grad_output));
  } else {
    cpu::backward(arguments, pool());
  }
  return grad_x0.finish();
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(TORCH_EXTENSION_NAME, m) {
  m.def("add_noise(Tensor x0, Tensor alpha, Tensor sigma, Tensor noise, int seed, int stream) -> Tensor");
  m.def("add_noise_backward(Tensor grad_output, Tensor alpha) -> Tensor");
}

DIFFPP_ON_EVERY_DEVICE(m) {
  m.impl("add_noise", TORCH_BOX(&noisy));
  m.impl("add_noise_backward", TORCH_BOX(&gradient));
}

}  // namespace diffpp::add_noise
