#include "../cpu/sid_loss.h"

#include "outputs.h"

namespace diffpp {
namespace {

// fake, cond, uncond, x0 [B, ...], alpha, sigma [B] -> the loss and |k| / mean|r|, each [B].
std::tuple<Tensor, Tensor> forward(
    const Tensor& fake, const Tensor& cond, const std::optional<Tensor>& uncond, const Tensor& x0, const Tensor& noise,
    int64_t seed, int64_t stream, const Tensor& alpha, const Tensor& sigma, double guidance_scale,
    int64_t prediction_type, double sid_alpha) {
  constexpr auto op = "sid_loss";
  OutputsArgument outputs(op, fake, cond, uncond, guidance_scale);
  const TargetArgument target(
      op, x0, noise, seed, stream, alpha, sigma, prediction_type, fake, outputs.order());
  outputs.set_target(target);
  const int64_t batch = outputs.view().layout.batch;
  const ScalarType dtype = compute_dtype(outputs.view().dtype);
  Tensor loss = empty_vector(batch, dtype, fake);
  Tensor factor = empty_vector(batch, dtype, fake);
  const int64_t chunks = Chunks(outputs.view().layout).count;
  std::vector<double> partials(2 * chunks);
  const SidLoss arguments{
      outputs.view(), sid_alpha, partials.data(), loss.mutable_data_ptr(), factor.mutable_data_ptr()};
  run(sid_loss_forward_kernel(), arguments, chunks, kChunksPerThread);
  sid_loss_combine_kernel()(arguments, 0, batch);
  return {loss, factor};
}

// grad_output, factor [B] and the arguments of the loss -> those gradients that are needed.
std::tuple<Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& grad_output, const Tensor& factor, const Tensor& fake, const Tensor& cond,
    const std::optional<Tensor>& uncond, const Tensor& x0, const Tensor& noise, int64_t seed, int64_t stream,
    const Tensor& alpha, const Tensor& sigma, double guidance_scale, int64_t prediction_type, double sid_alpha,
    bool needs_fake, bool needs_cond, bool needs_uncond, bool needs_x0) {
  constexpr auto op = "sid_loss_backward";
  OutputsArgument outputs(op, fake, cond, uncond, guidance_scale);
  const TargetArgument target(
      op, x0, noise, seed, stream, alpha, sigma, prediction_type, fake, outputs.order());
  outputs.set_target(target);
  OutputGradientsResult gradients(
      fake, cond, uncond, x0, needs_fake, needs_cond, needs_uncond, needs_x0, outputs.order());
  const int64_t batch = outputs.view().layout.batch;
  const SidGradient arguments{
      outputs.view(),
      sid_alpha,
      per_sample(op, "grad_output", grad_output, batch),
      per_sample(op, "factor", factor, batch),
      gradients.data()};
  run(sid_loss_backward_kernel(), arguments, Chunks(outputs.view().layout).count, kChunksPerThread);
  return gradients.finish();
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(diffpp_fast, m) {
  m.def(
      "sid_loss(Tensor fake, Tensor cond, Tensor? uncond, Tensor x0, Tensor noise, int seed, int stream, Tensor alpha, "
      "Tensor sigma, float guidance_scale, int prediction_type, float sid_alpha) -> (Tensor loss, Tensor factor)");
  m.def(
      "sid_loss_backward(Tensor grad_output, Tensor factor, Tensor fake, Tensor cond, Tensor? uncond, Tensor x0, "
      "Tensor noise, int seed, int stream, Tensor alpha, Tensor sigma, float guidance_scale, int prediction_type, "
      "float sid_alpha, bool needs_fake, bool needs_cond, bool needs_uncond, bool needs_x0) "
      "-> (Tensor grad_fake, Tensor grad_cond, Tensor grad_uncond, Tensor grad_x0)");
}

STABLE_TORCH_LIBRARY_IMPL(diffpp_fast, CPU, m) {
  m.impl("sid_loss", TORCH_BOX(&forward));
  m.impl("sid_loss_backward", TORCH_BOX(&backward));
}

}  // namespace diffpp
