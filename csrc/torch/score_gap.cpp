#include "../cpu/score_gap.h"

#include "cuda.h"
#include "outputs.h"

namespace diffpp {
namespace {

// Either way makes the same numbers in the same order; whole samples leave threads idle where there are few of them.
void run_on_cpu(const ScoreGap& arguments, const Chunks& chunks) {
  const int64_t batch = arguments.outputs.layout.batch;
  const int64_t threads = torch::stable::get_num_threads();
  if (batch % threads == 0 || batch >= 4 * threads) {
    const int64_t grain = (kChunksPerThread + chunks.per_sample - 1) / chunks.per_sample;
    run(score_gap_samples_kernel(), arguments, batch, grain);
  } else {
    run(score_gap_sums_kernel(), arguments, chunks.count, kChunksPerThread);
    score_gap_statistics_kernel()(arguments, 0, batch);
    if (arguments.mean_abs) run(score_gap_normalize_kernel(), arguments, chunks.count, kChunksPerThread);
  }
}

// fake, cond, uncond, x0 [B, ...], scales, alpha, sigma [B] -> the gradient like fake, sum d^2 [B], and for a target
// mean|r| and sum d r [B]. x0, noise, alpha and sigma make the target: all or none. `scales` take the place of `scale`.
std::tuple<Tensor, Tensor, Tensor, Tensor> forward(
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
  OutputsArgument outputs(op, fake, cond, uncond, guidance_scale);
  const Order& order = outputs.order();
  std::optional<TargetArgument> target;
  if (has_target) {
    target.emplace(op, *x0, *noise, seed, stream, *alpha, *sigma, prediction_type, fake, order);
    outputs.set_target(*target);
  }
  Result gradient(fake, order);
  const int64_t batch = order.layout().batch;
  const ScalarType dtype = compute_dtype(outputs.view().dtype);
  Tensor gap_sq = empty_vector(batch, dtype, fake);
  Tensor residual_abs = empty_vector(has_target ? batch : 0, dtype, fake);
  Tensor gap_dot_residual = empty_vector(has_target ? batch : 0, dtype, fake);
  const Chunks chunks(order.layout());
  const Workspace partials(3 * chunks.count * static_cast<int64_t>(sizeof(double)), fake);
  const ScoreGap arguments{
      outputs.view(),
      scale,
      per_sample(op, "scales", scales, batch),
      mean_abs,
      gradient.data(),
      partials.doubles(),
      gap_sq.mutable_data_ptr(),
      residual_abs.mutable_data_ptr(),
      gap_dot_residual.mutable_data_ptr()};
  if (!DIFFPP_ON_CUDA(fake, score_gap, arguments)) run_on_cpu(arguments, chunks);
  return {gradient.finish(), gap_sq, residual_abs, gap_dot_residual};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(diffpp_fast, m) {
  m.def(
      "score_gap(Tensor fake, Tensor cond, Tensor? uncond, float guidance_scale, float scale, Tensor? scales, "
      "bool mean_abs, Tensor? x0, Tensor? noise, int seed, int stream, Tensor? alpha, Tensor? sigma, "
      "int prediction_type) -> (Tensor gradient, Tensor gap_sq, Tensor residual_abs, Tensor gap_dot_residual)");
}

STABLE_TORCH_LIBRARY_IMPL(diffpp_fast, CPU, m) { m.impl("score_gap", TORCH_BOX(&forward)); }

#if defined(DIFFPP_CUDA)
STABLE_TORCH_LIBRARY_IMPL(diffpp_fast, CUDA, m) { m.impl("score_gap", TORCH_BOX(&forward)); }
#endif

}  // namespace diffpp
