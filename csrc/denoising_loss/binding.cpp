#include "../common/binding.h"
#include "arguments.h"

namespace diffpp::denoising_loss {
namespace {

// prediction, x0 [B, ...], alpha, sigma, weight [B] -> the loss, a scalar, and if asked for the residual.
std::tuple<Tensor, Tensor> loss_and_residual(
    const Tensor& prediction, const Tensor& x0, const Tensor& noise, int64_t seed, int64_t stream, const Tensor& alpha,
    const Tensor& sigma, int64_t prediction_type, const std::optional<Tensor>& weight, bool save_residual) {
  constexpr auto op = "denoising_loss";
  const Order order(prediction);
  const Tensor ordered = order.of(prediction);
  const Dtype dtype = dtype_of(op, "prediction", prediction);
  const TargetInput input{
      .x0 = x0, .noise = {noise, seed, stream}, .alpha = alpha, .sigma = sigma, .prediction_type = prediction_type};
  const OrderedTarget target(op, input, prediction, order);
  OptionalResult residual(save_residual, prediction, order);
  Tensor loss = torch::stable::empty({}, compute_dtype(dtype), std::nullopt, prediction.device());
  Forward arguments{
      .prediction = ordered.const_data_ptr(),
      .residual = residual.data(),
      .dtype = dtype,
      .layout = order.layout(),
      .target = target.view(),
      .weight = per_sample(op, "weight", weight, order.layout().batch),
      .loss = loss.mutable_data_ptr()};
  if (kCuda && prediction.is_cuda()) {
    const GpuMemory partials(cuda::bytes_of_partials(arguments), prediction);
    arguments.partials = partials.data();
    cuda::forward(arguments, GpuStream(prediction));
  } else {
    cpu::forward(arguments, pool());
  }
  return {loss, residual.finish()};
}

// grad_output, a scalar, residual [B, ...], weight [B] -> the gradient of prediction, like residual.
Tensor gradient_of_prediction(const Tensor& grad_output, const Tensor& residual, const std::optional<Tensor>& weight) {
  constexpr auto op = "denoising_loss_backward";
  STD_TORCH_CHECK(grad_output.dim() == 0, op, ": grad_output must be a scalar");
  const Order order(residual);
  const Tensor ordered = order.of(residual);
  Result gradient(residual, order);
  const Backward arguments{
      .residual = ordered.const_data_ptr(),
      .gradient = gradient.data(),
      .dtype = dtype_of(op, "residual", residual),
      .layout = order.layout(),
      .grad_output = {grad_output.const_data_ptr(), dtype_of(op, "grad_output", grad_output), 0},
      .weight = per_sample(op, "weight", weight, order.layout().batch)};
  if (kCuda && residual.is_cuda()) {
    cuda::backward(arguments, GpuStream(residual));
  } else {
    cpu::backward(arguments, pool());
  }
  return gradient.finish();
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(TORCH_EXTENSION_NAME, m) {
  m.def(
      "denoising_loss(Tensor prediction, Tensor x0, Tensor noise, int seed, int stream, Tensor alpha, Tensor sigma, "
      "int prediction_type, Tensor? weight, bool save_residual) -> (Tensor loss, Tensor residual)");
  m.def("denoising_loss_backward(Tensor grad_output, Tensor residual, Tensor? weight) -> Tensor");
}

DIFFPP_ON_EVERY_DEVICE(m) {
  m.impl("denoising_loss", TORCH_BOX(&loss_and_residual));
  m.impl("denoising_loss_backward", TORCH_BOX(&gradient_of_prediction));
}

}  // namespace diffpp::denoising_loss
