#include "../cpu/add_noise.h"

#include "cuda.h"
#include "tensor.h"

namespace diffpp {
namespace {

// x0 [B, ...], alpha [B], sigma [B] -> x_t like x0.
Tensor forward(
    const Tensor& x0, const Tensor& alpha, const Tensor& sigma, const Tensor& noise, int64_t seed, int64_t stream) {
  constexpr auto op = "add_noise";
  const Order order(x0);
  const Tensor ordered = order.of(x0);
  const NoiseArgument eps(op, noise, seed, stream, x0, order);
  Result x_t(x0, order);
  const int64_t batch = order.layout().batch;
  const AddNoise arguments{
      ordered.const_data_ptr(),
      x_t.data(),
      dtype_of(op, "x0", x0),
      order.layout(),
      per_sample(op, "alpha", alpha, batch),
      per_sample(op, "sigma", sigma, batch),
      eps.view()};
  if (!DIFFPP_ON_CUDA(x0, add_noise_forward, arguments))
    run(add_noise_forward_kernel(), arguments, Chunks(order.layout()).count, kChunksPerThread);
  return x_t.finish();
}

// grad_output [B, ...], alpha [B] -> the gradient of x0, like grad_output.
Tensor backward(const Tensor& grad_output, const Tensor& alpha) {
  constexpr auto op = "add_noise_backward";
  const Order order(grad_output);
  const Tensor ordered = order.of(grad_output);
  Result grad_x0(grad_output, order);
  const AddNoise arguments{
      ordered.const_data_ptr(),
      grad_x0.data(),
      dtype_of(op, "grad_output", grad_output),
      order.layout(),
      per_sample(op, "alpha", alpha, order.layout().batch),
      {},
      {}};
  if (!DIFFPP_ON_CUDA(grad_output, add_noise_backward, arguments))
    run(add_noise_backward_kernel(), arguments, Chunks(order.layout()).count, kChunksPerThread);
  return grad_x0.finish();
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(diffpp_fast, m) {
  m.def("add_noise(Tensor x0, Tensor alpha, Tensor sigma, Tensor noise, int seed, int stream) -> Tensor");
  m.def("add_noise_backward(Tensor grad_output, Tensor alpha) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(diffpp_fast, CPU, m) {
  m.impl("add_noise", TORCH_BOX(&forward));
  m.impl("add_noise_backward", TORCH_BOX(&backward));
}

#if defined(DIFFPP_CUDA)
STABLE_TORCH_LIBRARY_IMPL(diffpp_fast, CUDA, m) {
  m.impl("add_noise", TORCH_BOX(&forward));
  m.impl("add_noise_backward", TORCH_BOX(&backward));
}
#endif

}  // namespace diffpp
