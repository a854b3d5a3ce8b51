#include "../cpu/sim_loss.h"

#include "outputs.h"

namespace diffpp {
namespace {

// fake, cond, uncond, x0 [B, ...], alpha, sigma [B] -> the loss, m^2 / n and m^2 Q / n^2, each [B].
std::tuple<Tensor, Tensor, Tensor> forward(
    const Tensor& fake, const Tensor& cond, const std::optional<Tensor>& uncond, const Tensor& x0, const Tensor& noise,
    int64_t seed, int64_t stream, const Tensor& alpha, const Tensor& sigma, double guidance_scale,
    int64_t prediction_type, double huber_c) {
  constexpr auto op = "sim_loss";
  OutputsArgument outputs(op, fake, cond, uncond, guidance_scale);
  const TargetArgument target(
      op, x0, noise, seed, stream, alpha, sigma, prediction_type, fake, outputs.order());
  outputs.set_target(target);
  const int64_t batch = outputs.view().layout.batch;
  const ScalarType dtype = compute_dtype(outputs.view().dtype);
  Tensor loss = empty_vector(batch, dtype, fake);
  Tensor factor = empty_vector(batch, dtype, fake);
  Tensor shrink = empty_vector(batch, dtype, fake);
  const int64_t chunks = Chunks(outputs.view().layout).count;
  std::vector<double> partials(2 * chunks);
  const SimLoss arguments{
      outputs.view(),
      huber_c,
      partials.data(),
      loss.mutable_data_ptr(),
      factor.mutable_data_ptr(),
      shrink.mutable_data_ptr()};
  run(sim_loss_forward_kernel(), arguments, chunks, kChunksPerThread);
  sim_loss_combine_kernel()(arguments, 0, batch);
  return {loss, factor, shrink};
}

// grad_output, factor, shrink [B] and the arguments of the loss -> those gradients that are needed.
std::tuple<Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& grad_output, const Tensor& factor, const Tensor& shrink, const Tensor& fake, const Tensor& cond,
    const std::optional<Tensor>& uncond, const Tensor& x0, const Tensor& noise, int64_t seed, int64_t stream,
    const Tensor& alpha, const Tensor& sigma, double guidance_scale, int64_t prediction_type, bool needs_fake,
    bool needs_cond, bool needs_uncond, bool needs_x0) {
  constexpr auto op = "sim_loss_backward";
  OutputsArgument outputs(op, fake, cond, uncond, guidance_scale);
  const TargetArgument target(
      op, x0, noise, seed, stream, alpha, sigma, prediction_type, fake, outputs.order());
  outputs.set_target(target);
  OutputGradientsResult gradients(
      fake, cond, uncond, x0, needs_fake, needs_cond, needs_uncond, needs_x0, outputs.order());
  const int64_t batch = outputs.view().layout.batch;
  const SimGradient arguments{
      outputs.view(),
      per_sample(op, "grad_output", grad_output, batch),
      per_sample(op, "factor", factor, batch),
      per_sample(op, "shrink", shrink, batch),
      gradients.data()};
  run(sim_loss_backward_kernel(), arguments, Chunks(outputs.view().layout).count, kChunksPerThread);
  return gradients.finish();
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(diffpp_fast, m) {
  m.def(
      "sim_loss(Tensor fake, Tensor cond, Tensor? uncond, Tensor x0, Tensor noise, int seed, int stream, Tensor alpha, "
      "Tensor sigma, float guidance_scale, int prediction_type, float huber_c) "
      "-> (Tensor loss, Tensor factor, Tensor shrink)");
  m.def(
      "sim_loss_backward(Tensor grad_output, Tensor factor, Tensor shrink, Tensor fake, Tensor cond, Tensor? uncond, "
      "Tensor x0, Tensor noise, int seed, int stream, Tensor alpha, Tensor sigma, float guidance_scale, "
      "int prediction_type, bool needs_fake, bool needs_cond, bool needs_uncond, bool needs_x0) "
      "-> (Tensor grad_fake, Tensor grad_cond, Tensor grad_uncond, Tensor grad_x0)");
}

STABLE_TORCH_LIBRARY_IMPL(diffpp_fast, CPU, m) {
  m.impl("sim_loss", TORCH_BOX(&forward));
  m.impl("sim_loss_backward", TORCH_BOX(&backward));
}

}  // namespace diffpp
