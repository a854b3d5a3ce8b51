#include "../common/binding.h"
#include "arguments.h"

namespace diffpp::score_gap {
namespace {

// The arguments of the schemas: fake, cond, uncond, x0 [B, ...], scales, alpha, sigma [B]. x0, noise, alpha and sigma make the
// target: all or none. `scales` take the place of `scale`.
struct Input {
  const Tensor& fake;
  const Tensor& cond;
  const std::optional<Tensor>& uncond;
  double guidance_scale;
  double scale;
  const std::optional<Tensor>& scales;
  bool mean_abs;
  const std::optional<Tensor>& x0;
  const std::optional<Tensor>& noise;
  int64_t seed;
  int64_t stream;
  const std::optional<Tensor>& alpha;
  const std::optional<Tensor>& sigma;
  int64_t prediction_type;
};

// reward_score [B, ...], reward_scales [B], and where its statistics go, [B] each.
struct RewardInput {
  const Tensor& score;
  double scale;
  const std::optional<Tensor>& scales;
  double clip;
  const Tensor& reward_sq;
  const Tensor& gap_dot_reward;
  const Tensor& share;
};

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// The gradient like fake, sum d^2 [B], and for a target mean|r| and sum d r [B].
Results results_of(const Input& in, const RewardInput* reward) {
  constexpr auto op = "score_gap";
  const bool has_target = in.x0.has_value();
  STD_TORCH_CHECK(
      in.noise.has_value() == has_target && in.alpha.has_value() == has_target && in.sigma.has_value() == has_target, op,
      ": x0, noise, alpha and sigma are given together");
  STD_TORCH_CHECK(has_target || !in.mean_abs, op, ": mean_abs needs the target");
  OutputsInput input{
      .fake = in.fake, .cond = in.cond, .uncond = in.uncond, .guidance_scale = in.guidance_scale, .target = {}};
  if (has_target)
    input.target.emplace(TargetInput{
        .x0 = *in.x0,
        .noise = {*in.noise, in.seed, in.stream},
        .alpha = *in.alpha,
        .sigma = *in.sigma,
        .prediction_type = in.prediction_type});
  const OrderedOutputs outputs(op, input);
  STD_TORCH_CHECK(outputs.view().layout.sample() > 0, op, ": a sample of fake has no elements");
  Result gradient(in.fake, outputs.order());
  const int64_t batch = outputs.view().layout.batch;
  const ScalarType dtype = compute_dtype(outputs.view().dtype);
  Tensor gap_sq = empty_vector(batch, dtype, in.fake);
  Tensor residual_abs = empty_vector(has_target ? batch : 0, dtype, in.fake);
  Tensor gap_dot_residual = empty_vector(has_target ? batch : 0, dtype, in.fake);
  Arguments arguments{
      .outputs = outputs.view(),
      .scale = in.scale,
      .scales = per_sample(op, "scales", in.scales, batch),
      .mean_abs = in.mean_abs,
      .gradient = gradient.data(),
      .gap_sq = gap_sq.mutable_data_ptr(),
      .residual_abs = residual_abs.mutable_data_ptr(),
      .gap_dot_residual = gap_dot_residual.mutable_data_ptr(),
      .reward = {}};
  std::optional<Tensor> score;  // in the order of fake
  if (reward != nullptr) {
    check_same_shape(op, "reward_score", reward->score, in.fake);
    check_same_dtype(op, "reward_score", reward->score, in.fake);
    score = outputs.order().of(reward->score);
    arguments.reward = {
        .score = score->const_data_ptr(),
        .scale = reward->scale,
        .scales = per_sample(op, "reward_scales", reward->scales, batch),
        .clip = reward->clip,
        .reward_sq = reward->reward_sq.mutable_data_ptr(),
        .gap_dot_reward = reward->gap_dot_reward.mutable_data_ptr(),
        .share = reward->share.mutable_data_ptr()};
  }
  if (kCuda && in.fake.is_cuda()) {
    const GpuMemory partials(cuda::bytes_of_partials(arguments), in.fake);
    arguments.partials = partials.data();
    cuda::forward(arguments, GpuStream(in.fake));
  } else {
    cpu::forward(arguments, pool());
  }
  return {gradient.finish(), gap_sq, residual_abs, gap_dot_residual};
}

Results gradient_and_statistics(
    const Tensor& fake, const Tensor& cond, const std::optional<Tensor>& uncond, double guidance_scale, double scale,
    const std::optional<Tensor>& scales, bool mean_abs, const std::optional<Tensor>& x0,
    const std::optional<Tensor>& noise, int64_t seed, int64_t stream, const std::optional<Tensor>& alpha,
    const std::optional<Tensor>& sigma, int64_t prediction_type) {
  return results_of(
      {fake, cond, uncond, guidance_scale, scale, scales, mean_abs, x0, noise, seed, stream, alpha, sigma, prediction_type},
      nullptr);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> with_reward(
    const Tensor& fake, const Tensor& cond, const std::optional<Tensor>& uncond, double guidance_scale, double scale,
    const std::optional<Tensor>& scales, bool mean_abs, const std::optional<Tensor>& x0,
    const std::optional<Tensor>& noise, int64_t seed, int64_t stream, const std::optional<Tensor>& alpha,
    const std::optional<Tensor>& sigma, int64_t prediction_type, const Tensor& reward_score, double reward_scale,
    const std::optional<Tensor>& reward_scales, double reward_clip) {
  const ScalarType dtype = compute_dtype(dtype_of("score_gap", "fake", fake));
  Tensor reward_sq = empty_vector(fake.size(0), dtype, fake);
  Tensor gap_dot_reward = empty_vector(fake.size(0), dtype, fake);
  Tensor share = empty_vector(fake.size(0), dtype, fake);
  const RewardInput reward{reward_score, reward_scale, reward_scales, reward_clip, reward_sq, gap_dot_reward, share};
  const auto [gradient, gap_sq, residual_abs, gap_dot_residual] = results_of(
      {fake, cond, uncond, guidance_scale, scale, scales, mean_abs, x0, noise, seed, stream, alpha, sigma, prediction_type},
      &reward);
  return {gradient, gap_sq, residual_abs, gap_dot_residual, reward_sq, gap_dot_reward, share};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(TORCH_EXTENSION_NAME, m) {
  m.def(
      "score_gap(Tensor fake, Tensor cond, Tensor? uncond, float guidance_scale, float scale, Tensor? scales, "
      "bool mean_abs, Tensor? x0, Tensor? noise, int seed, int stream, Tensor? alpha, Tensor? sigma, "
      "int prediction_type) -> (Tensor gradient, Tensor gap_sq, Tensor residual_abs, Tensor gap_dot_residual)");
  m.def(
      "score_gap_with_reward(Tensor fake, Tensor cond, Tensor? uncond, float guidance_scale, float scale, Tensor? scales, "
      "bool mean_abs, Tensor? x0, Tensor? noise, int seed, int stream, Tensor? alpha, Tensor? sigma, "
      "int prediction_type, Tensor reward_score, float reward_scale, Tensor? reward_scales, float reward_clip) -> "
      "(Tensor gradient, Tensor gap_sq, Tensor residual_abs, Tensor gap_dot_residual, Tensor reward_sq, "
      "Tensor gap_dot_reward, Tensor reward_share)");
}

DIFFPP_ON_EVERY_DEVICE(m) {
  m.impl("score_gap", TORCH_BOX(&gradient_and_statistics));
  m.impl("score_gap_with_reward", TORCH_BOX(&with_reward));
}

}  // namespace diffpp::score_gap
