#include "../common/binding.h"
#include "arguments.h"

namespace diffpp::gap_loss {
namespace {

OutputsInput inputs(
    const Tensor& fake, const Tensor& cond, const std::optional<Tensor>& uncond, double guidance_scale,
    const TargetInput& target) {
  return {.fake = fake, .cond = cond, .uncond = uncond, .guidance_scale = guidance_scale, .target = target};
}

// fake, cond, uncond, x0 [B, ...], alpha, sigma [B] -> the loss, factor and, of SIM, shrink, each [B].
template <Kind kind>
auto loss(
    const Tensor& fake, const Tensor& cond, const std::optional<Tensor>& uncond, const Tensor& x0, const Tensor& noise,
    int64_t seed, int64_t stream, const Tensor& alpha, const Tensor& sigma, double guidance_scale,
    int64_t prediction_type, double option) {
  const OrderedOutputs outputs(
      kind == Kind::sid ? "sid_loss" : "sim_loss",
      inputs(fake, cond, uncond, guidance_scale, {x0, {noise, seed, stream}, alpha, sigma, prediction_type}));
  const int64_t batch = outputs.view().layout.batch;
  const ScalarType dtype = compute_dtype(outputs.view().dtype);
  Tensor loss = empty_vector(batch, dtype, fake);
  Tensor factor = empty_vector(batch, dtype, fake);
  Forward arguments{
      .outputs = outputs.view(),
      .kind = kind,
      .option = option,
      .loss = loss.mutable_data_ptr(),
      .factor = factor.mutable_data_ptr(),
      .shrink = nullptr};
  if constexpr (kind == Kind::sid) {
    cpu::forward(arguments, pool());
    return std::tuple(loss, factor);
  } else {
    Tensor shrink = empty_vector(batch, dtype, fake);
    arguments.shrink = shrink.mutable_data_ptr();
    cpu::forward(arguments, pool());
    return std::tuple(loss, factor, shrink);
  }
}

struct Needs {
  bool fake, cond, uncond, x0;
};

// The gradient of the loss, what its forward pass saved, and twice the slope.
struct Saved {
  const Tensor& grad_output;
  const Tensor& factor;
  std::optional<Tensor> shrink;
  double curvature;
};

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// Those gradients that are needed.
Gradients gradients(const char* op, const Saved& saved, const OutputsInput& input, const Needs& needs) {
  const OrderedOutputs outputs(op, input);
  const Order& order = outputs.order();
  const bool has_uncond = input.uncond.has_value();
  OptionalResult fake(needs.fake, input.fake, order), cond(needs.cond, input.cond, order);
  OptionalResult uncond(needs.uncond && has_uncond, has_uncond ? *input.uncond : input.fake, order);
  OptionalResult x0(needs.x0, input.target->x0, order);
  const int64_t batch = outputs.view().layout.batch;
  const Backward arguments{
      .outputs = outputs.view(),
      .curvature = saved.curvature,
      .grad_output = per_sample(op, "grad_output", saved.grad_output, batch),
      .factor = per_sample(op, "factor", saved.factor, batch),
      .shrink = per_sample(op, "shrink", saved.shrink, batch),
      .grad_fake = fake.data(),
      .grad_cond = cond.data(),
      .grad_uncond = uncond.data(),
      .grad_x0 = x0.data()};
  cpu::backward(arguments, pool());
  return {fake.finish(), cond.finish(), uncond.finish(), x0.finish()};
}

// grad_output, factor [B] and the arguments of the loss.
Gradients sid_gradients(
    const Tensor& grad_output, const Tensor& factor, const Tensor& fake, const Tensor& cond,
    const std::optional<Tensor>& uncond, const Tensor& x0, const Tensor& noise, int64_t seed, int64_t stream,
    const Tensor& alpha, const Tensor& sigma, double guidance_scale, int64_t prediction_type, double sid_alpha,
    bool needs_fake, bool needs_cond, bool needs_uncond, bool needs_x0) {
  return gradients(
      "sid_loss_backward", {grad_output, factor, std::nullopt, 2.0 * sid_alpha},
      inputs(fake, cond, uncond, guidance_scale, {x0, {noise, seed, stream}, alpha, sigma, prediction_type}),
      {needs_fake, needs_cond, needs_uncond, needs_x0});
}

// grad_output, factor, shrink [B] and the arguments of the loss.
Gradients sim_gradients(
    const Tensor& grad_output, const Tensor& factor, const Tensor& shrink, const Tensor& fake, const Tensor& cond,
    const std::optional<Tensor>& uncond, const Tensor& x0, const Tensor& noise, int64_t seed, int64_t stream,
    const Tensor& alpha, const Tensor& sigma, double guidance_scale, int64_t prediction_type, bool needs_fake,
    bool needs_cond, bool needs_uncond, bool needs_x0) {
  return gradients(
      "sim_loss_backward", {grad_output, factor, shrink, 2.0},
      inputs(fake, cond, uncond, guidance_scale, {x0, {noise, seed, stream}, alpha, sigma, prediction_type}),
      {needs_fake, needs_cond, needs_uncond, needs_x0});
}

}  // namespace

#define DIFFPP_OUTPUTS                                                                                             \
  "Tensor fake, Tensor cond, Tensor? uncond, Tensor x0, Tensor noise, int seed, int stream, Tensor alpha, Tensor " \
  "sigma, float guidance_scale, int prediction_type"
#define DIFFPP_NEEDS "bool needs_fake, bool needs_cond, bool needs_uncond, bool needs_x0"
#define DIFFPP_GRADIENTS "(Tensor grad_fake, Tensor grad_cond, Tensor grad_uncond, Tensor grad_x0)"

STABLE_TORCH_LIBRARY_FRAGMENT(TORCH_EXTENSION_NAME, m) {
  m.def("sid_loss(" DIFFPP_OUTPUTS ", float sid_alpha) -> (Tensor loss, Tensor factor)");
  m.def("sim_loss(" DIFFPP_OUTPUTS ", float huber_c) -> (Tensor loss, Tensor factor, Tensor shrink)");
  m.def("sid_loss_backward(Tensor grad_output, Tensor factor, " DIFFPP_OUTPUTS ", float sid_alpha, " DIFFPP_NEEDS ") -> "
        DIFFPP_GRADIENTS);
  m.def("sim_loss_backward(Tensor grad_output, Tensor factor, Tensor shrink, " DIFFPP_OUTPUTS ", " DIFFPP_NEEDS ") -> "
        DIFFPP_GRADIENTS);
}

STABLE_TORCH_LIBRARY_IMPL(TORCH_EXTENSION_NAME, CPU, m) {
  m.impl("sid_loss", TORCH_BOX(&loss<Kind::sid>));
  m.impl("sim_loss", TORCH_BOX(&loss<Kind::sim>));
  m.impl("sid_loss_backward", TORCH_BOX(&sid_gradients));
  m.impl("sim_loss_backward", TORCH_BOX(&sim_gradients));
}

}  // namespace diffpp::gap_loss
