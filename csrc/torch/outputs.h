// Network outputs and targets as bindings take them. In schemas, `prediction_type` is an index into PREDICTION_TYPES: a
// string argument would leak, since the headers of torch's stable ABI (2.13's, too) never free their copy of it.
#pragma once

#include <vector>

#include "../cpu/outputs.h"
#include "tensor.h"

namespace diffpp {

// The target of a prediction. Owns the copies that it needed; what the target does not hold is not copied.
class TargetArgument {
 public:
  TargetArgument(
      const char* op, const Tensor& x0, const Tensor& noise, int64_t seed, int64_t stream, const Tensor& alpha,
      const Tensor& sigma, int64_t prediction, const Tensor& like, const Order& order)
      : x0_(x0) {
    STD_TORCH_CHECK(
        prediction >= 0 && prediction <= static_cast<int64_t>(Prediction::sample), op,
        ": unknown prediction type number ", prediction);
    view_.prediction = static_cast<Prediction>(prediction);
    check_same_shape(op, "x0", x0, like);
    check_same_dtype(op, "x0", x0, like);
    const int64_t batch = order.layout().batch;
    view_.alpha = per_sample(op, "alpha", alpha, batch);
    view_.sigma = per_sample(op, "sigma", sigma, batch);
    if (Target::holds_x0(view_.prediction)) {
      x0_ = order.of(x0);
      view_.x0 = x0_.const_data_ptr();
    }
    if (Target::holds_noise(view_.prediction)) {
      noise_.emplace(op, noise, seed, stream, like, order);
      view_.noise = noise_->view();
    }
  }

  const Target& view() const { return view_; }

 private:
  Tensor x0_;
  std::optional<NoiseArgument> noise_;
  Target view_;
};

// Three network outputs, in the order of `fake`. Owns the copies that it needed.
class OutputsArgument {
 public:
  OutputsArgument(
      const char* op, const Tensor& fake, const Tensor& cond, const std::optional<Tensor>& uncond,
      double guidance_scale)
      : order_(fake), fake_(order_.of(fake)), cond_(order_.of(cond)) {
    view_ = {};
    view_.dtype = dtype_of(op, "fake", fake);
    view_.layout = order_.layout();
    view_.fake = fake_.const_data_ptr();
    check_same_shape(op, "cond", cond, fake);
    check_same_dtype(op, "cond", cond, fake);
    view_.cond = cond_.const_data_ptr();
    if (uncond.has_value()) {
      check_same_shape(op, "uncond", *uncond, fake);
      check_same_dtype(op, "uncond", *uncond, fake);
      uncond_ = order_.of(*uncond);
      view_.uncond = uncond_->const_data_ptr();
    }
    view_.guidance_scale = guidance_scale;
  }

  // The target must outlive the view.
  void set_target(const TargetArgument& target) {
    view_.has_target = true;
    view_.target = target.view();
  }

  const Order& order() const { return order_; }
  const Outputs& view() const { return view_; }

 private:
  Order order_;
  Tensor fake_;
  Tensor cond_;
  std::optional<Tensor> uncond_;
  Outputs view_;
};

// A result that may not be asked for: then a tensor without elements.
class OptionalResult {
 public:
  OptionalResult(bool needed, const Tensor& like, const Order& order) {
    if (needed) {
      result_.emplace(like, order);
    } else {
      nothing_ = empty_vector(0, like.scalar_type(), like);
    }
  }

  void* data() const { return result_.has_value() ? result_->data() : nullptr; }
  Tensor finish() { return result_.has_value() ? result_->finish() : nothing_; }

 private:
  std::optional<Result> result_;
  Tensor nothing_;
};

// The gradients of three outputs and x0, each where it is needed.
class OutputGradientsResult {
 public:
  OutputGradientsResult(
      const Tensor& fake, const Tensor& cond, const std::optional<Tensor>& uncond, const Tensor& x0, bool needs_fake,
      bool needs_cond, bool needs_uncond, bool needs_x0, const Order& order)
      : fake_(needs_fake, fake, order),
        cond_(needs_cond, cond, order),
        uncond_(needs_uncond && uncond.has_value(), uncond.has_value() ? *uncond : fake, order),
        x0_(needs_x0, x0, order) {}

  OutputGradients data() const { return {fake_.data(), cond_.data(), uncond_.data(), x0_.data()}; }
  std::tuple<Tensor, Tensor, Tensor, Tensor> finish() {
    return {fake_.finish(), cond_.finish(), uncond_.finish(), x0_.finish()};
  }

 private:
  OptionalResult fake_;
  OptionalResult cond_;
  OptionalResult uncond_;
  OptionalResult x0_;
};

}  // namespace diffpp
