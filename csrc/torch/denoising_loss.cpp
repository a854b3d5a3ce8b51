#include "../cpu/denoising_loss.h"

#include "cuda.h"
#include "outputs.h"

namespace diffpp {
namespace {

// prediction, x0 [B, ...], alpha, sigma, weight [B] -> the loss, a scalar, and if asked for the residual.
std::tuple<Tensor, Tensor> forward(
    const Tensor& prediction, const Tensor& x0, const Tensor& noise, int64_t seed, int64_t stream, const Tensor& alpha,
    const Tensor& sigma, int64_t prediction_type, const std::optional<Tensor>& weight, bool save_residual) {
  constexpr auto op = "denoising_loss";
  const Order order(prediction);
  const Tensor ordered = order.of(prediction);
  const Dtype dtype = dtype_of(op, "prediction", prediction);
  const TargetArgument target(op, x0, noise, seed, stream, alpha, sigma, prediction_type, prediction, order);
  OptionalResult residual(save_residual, prediction, order);
  Tensor loss = torch::stable::empty({}, compute_dtype(dtype), std::nullopt, prediction.device());
  const int64_t chunks = Chunks(order.layout()).count;
  const Workspace partials(chunks * static_cast<int64_t>(sizeof(double)), prediction);
  const DenoisingLoss arguments{
      ordered.const_data_ptr(),
      residual.data(),
      dtype,
      order.layout(),
      target.view(),
      per_sample(op, "weight", weight, order.layout().batch),
      partials.doubles(),
      loss.mutable_data_ptr()};
  if (!DIFFPP_ON_CUDA(prediction, denoising_loss_forward, arguments)) {
    run(denoising_loss_forward_kernel(), arguments, chunks, kChunksPerThread);
    denoising_loss_combine_kernel()(arguments, 0, 1);
  }
  return {loss, residual.finish()};
}

// grad_output, a scalar, residual [B, ...], weight [B] -> the gradient of prediction, like residual.
Tensor backward(const Tensor& grad_output, const Tensor& residual, const std::optional<Tensor>& weight) {
  constexpr auto op = "denoising_loss_backward";
  STD_TORCH_CHECK(grad_output.dim() == 0, op, ": grad_output must be a scalar");
  const Order order(residual);
  const Tensor ordered = order.of(residual);
  Result gradient(residual, order);
  const DenoisingGradient arguments{
      ordered.const_data_ptr(),
      gradient.data(),
      dtype_of(op, "residual", residual),
      order.layout(),
      {grad_output.const_data_ptr(), dtype_of(op, "grad_output", grad_output), 0},
      per_sample(op, "weight", weight, order.layout().batch)};
  if (!DIFFPP_ON_CUDA(residual, denoising_loss_backward, arguments))
    run(denoising_loss_backward_kernel(), arguments, Chunks(order.layout()).count, kChunksPerThread);
  return gradient.finish();
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(diffpp_fast, m) {
  m.def(
      "denoising_loss(Tensor prediction, Tensor x0, Tensor noise, int seed, int stream, Tensor alpha, Tensor sigma, "
      "int prediction_type, Tensor? weight, bool save_residual) -> (Tensor loss, Tensor residual)");
  m.def("denoising_loss_backward(Tensor grad_output, Tensor residual, Tensor? weight) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(diffpp_fast, CPU, m) {
  m.impl("denoising_loss", TORCH_BOX(&forward));
  m.impl("denoising_loss_backward", TORCH_BOX(&backward));
}

#if defined(DIFFPP_CUDA)
STABLE_TORCH_LIBRARY_IMPL(diffpp_fast, CUDA, m) {
  m.impl("denoising_loss", TORCH_BOX(&forward));
  m.impl("denoising_loss_backward", TORCH_BOX(&backward));
}
#endif

}  // namespace diffpp
