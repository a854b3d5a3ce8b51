#include "../common/binding.h"
#include "arguments.h"

namespace diffpp::score_gap {
namespace {

// fake, cond, uncond, x0 [B, ...], scales, alpha, sigma [B] -> the gradient like fake, sum d^2 [B], and for a target
// mean|r| and sum d r [B]. x0, noise, alpha and sigma make the target: all or none. `scales` take the place of `scale`.
std::tuple<Tensor, Tensor, Tensor, Tensor> gradient_and_statistics(
    const Tensor& fake, const Tensor& cond, const std::optional<Tensor>& uncond, double guidance_scale, double scale,
    const std::optional<Tensor>& scales, bool mean_abs, const std::optional<Tensor>& x0,
    const std::optional<Tensor>& noise, int64_t seed, int64_t stream, const std::optional<Tensor>& alpha,
    const std::optional<Tensor>& sigma, int64_t prediction_type) {
  constexpr auto op = "score_gap";
  const bool has_target = x0.has_value();
  STD_TORCH_CHECK(
      noise.has_value() == has_target && alpha.has_value() == has_target && sigma.has_value() == has_target, op,
      ": x0, noise, alpha and sigma are given together");
  STD_TORCH_CHECK(has_target || !mean_abs, op, ": mean_abs needs the target");
  OutputsInput input{.fake = fake, .cond = cond, .uncond = uncond, .guidance_scale = guidance_scale, .target = {}};
  if (has_target)
    input.target.emplace(TargetInput{
        .x0 = *x0, .noise = {*noise, seed, stream}, .alpha = *alpha, .sigma = *sigma, .prediction_type = prediction_type});
  const OrderedOutputs outputs(op, input);
  STD_TORCH_CHECK(outputs.view().layout.sample() > 0, op, ": a sample of fake has no elements");
  Result gradient(fake, outputs.order());
  const int64_t batch = outputs.view().layout.batch;
  const ScalarType dtype = compute_dtype(outputs.view().dtype);
  Tensor gap_sq = empty_vector(batch, dtype, fake);
  Tensor residual_abs = empty_vector(has_target ? batch : 0, dtype, fake);
  Tensor gap_dot_residual = empty_vector(has_target ? batch : 0, dtype, fake);
  Arguments arguments{
      .outputs = outputs.view(),
      .scale = scale,
      .scales = per_sample(op, "scales", scales, batch),
      .mean_abs = mean_abs,
      .gradient = gradient.data(),
      .gap_sq = gap_sq.mutable_data_ptr(),
      .residual_abs = residual_abs.mutable_data_ptr(),
      .gap_dot_residual = gap_dot_residual.mutable_data_ptr()};
  if (kCuda && fake.is_cuda()) {
    const GpuMemory partials(cuda::bytes_of_partials(arguments), fake);
    arguments.partials = partials.data();
    cuda::forward(arguments, GpuStream(fake));
  } else {
    cpu::forward(arguments, pool());
  }
  return {gradient.finish(), gap_sq, residual_abs, gap_dot_residual};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(diffpp_fast, m) {
  m.def(
      "score_gap(Tensor fake, Tensor cond, Tensor? uncond, float guidance_scale, float scale, Tensor? scales, "
      "bool mean_abs, Tensor? x0, Tensor? noise, int seed, int stream, Tensor? alpha, Tensor? sigma, "
      "int prediction_type) -> (Tensor gradient, Tensor gap_sq, Tensor residual_abs, Tensor gap_dot_residual)");
}

DIFFPP_ON_EVERY_DEVICE(m) { m.impl("score_gap", TORCH_BOX(&gradient_and_statistics)); }

}  // namespace diffpp::score_gap
