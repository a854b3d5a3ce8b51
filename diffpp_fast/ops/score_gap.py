"""The gradient of Diff-Instruct++ and its relatives on the generator's sample, with the statistics of the score gap."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffpp_fast import availability, transforms
from diffpp_fast.arguments import number
from diffpp_fast.backends import kernels, register
from diffpp_fast.noise import Noise
from diffpp_fast.ops import checks
from diffpp_fast.ops.autograd import needs_gradient, refused
from diffpp_fast.plain import compute_dtype, mean_abs_per_sample, per_sample, stored_like, sum_per_sample
from diffpp_fast.prediction import MEAN_ABS_FLOOR, PREDICTION_TYPES, guide, regression_target

NORMALIZERS = (None, "mean_abs")


class ScoreGap(NamedTuple):
    """The result of `score_gap`, with d = guided - fake and r = guided - target.

    The statistics are float32, float64 for float64 inputs.
    """

    gradient: Tensor  # [B, ...] scale_b * d / N_b
    gap_sq: Tensor  # [B] sum d^2
    residual_abs: Tensor | None  # [B] mean |r|
    gap_dot_residual: Tensor | None  # [B] sum d r


def score_gap(
    fake: Tensor,
    cond: Tensor,
    uncond: Tensor | None = None,
    *,
    guidance_scale: float | None = None,
    scale: float | Tensor = 1.0,
    normalizer: str | None = None,
    x0: Tensor | None = None,
    noise: Noise | Tensor | None = None,
    alpha: Tensor | None = None,
    sigma: Tensor | None = None,
    prediction_type: str = "epsilon",
) -> ScoreGap:
    """scale_b * d / N_b with d = guided - fake and guided = uncond + guidance_scale (cond - uncond).

    With scale = `NoiseSchedule.gap_scale(t)` the gradient is the difference of implied x0, fake minus guided: that of
    Diff-Instruct. With scale = sign of it and normalizer "mean_abs" it is that of DMD.

    Args:
        fake: [B, ...], the output of the fake (teaching-assistant) network at (x_t, t).
        cond: [B, ...], the reference network's output with the prompt.
        uncond: [B, ...], its output without; may be None if guidance_scale is 1.
        guidance_scale: diffusers' convention, 1 is no guidance. None is 1; with `uncond` it has to be stated.
        scale: a number, or [B].
        normalizer: None for N = 1, "mean_abs" for N = mean|r|, taken as at least 1e-6 so that the gradient stays
            finite where guided equals the target.
        x0, noise, alpha, sigma: the sample, the noise and the coefficients [B] behind x_t, all four or none. They
            make the target of `prediction_type`, as in `denoising_loss`; "mean_abs" needs them.
        prediction_type: "epsilon", "v_prediction", "flow_prediction" or "sample".

    Returns:
        `ScoreGap(gradient, gap_sq, residual_abs, gap_dot_residual)`: the gradient in the common dtype of the large
        tensors and the memory format of `fake`, the statistics per sample, the last two None without a target.

    Transforms:
        Nothing is differentiable: the outputs are constants that carry no graph, as `detach` has it. Where they would
        vanish unseen, a derivative by an argument raises: a tangent (forward mode), or that of `torch.func`. There
        detach the arguments. `vmap` is exact.

    Raises:
        TypeError: an argument is not a floating-point tensor, or not a number where one is due.
        ValueError: shapes, batch sizes or devices differ; a sample has no elements; `uncond` is given without
            guidance_scale, or is missing; a number is not finite; the target is missing or incomplete; unknown
            normalizer or prediction type.
        RuntimeError: a tangent or a derivative of `torch.func` goes through the operator.
    """
    op = "score_gap"
    kind = checks.prediction_type(op, prediction_type)
    checks.one_of(op, "normalizer", normalizer, NORMALIZERS)
    scale, scales = (1.0, scale) if isinstance(scale, Tensor) else (number(op, "scale", scale), None)
    checks.floating(
        op,
        {"fake": fake, "cond": cond, "uncond": uncond, "x0": x0, "alpha": alpha, "sigma": sigma, "scale": scales},
        optional=("uncond", "x0", "alpha", "sigma", "scale"),
    )
    checks.same_shape(op, {"fake": fake, "cond": cond, "uncond": uncond, "x0": x0})
    checks.per_sample(op, fake.shape[0], {"alpha": alpha, "sigma": sigma, "scale": scales})
    checks.elements(op, "fake", fake)
    if guidance_scale is None:
        if uncond is not None:
            raise ValueError(f"{op}: uncond is given without guidance_scale: state the scale (1 leaves uncond unused)")
        guidance_scale = 1.0
    guidance_scale = checks.guidance(op, uncond, guidance_scale)
    target = {"x0": x0, "noise": noise, "alpha": alpha, "sigma": sigma}
    missing = [name for name, value in target.items() if value is None]
    if missing and (normalizer == "mean_abs" or len(missing) < len(target)):
        raise ValueError(f"{op}: the target needs x0, noise, alpha and sigma; missing: {', '.join(missing)}")

    eps, seed, stream = (None, 0, 0) if noise is None else checks.address(op, noise, fake)
    x0 = None if x0 is None else checks.target_x0(prediction_type, x0, fake)
    fake, cond, uncond, x0, eps = checks.promoted(fake, cond, uncond, x0, eps)
    mean_abs = normalizer == "mean_abs"
    of_target = (x0, eps, seed, stream, alpha, sigma, kind)
    arguments = (fake, cond, uncond, guidance_scale, scale, scales, mean_abs, *of_target)
    if transforms.active():
        message = f"{op} is not differentiable, its outputs are constants: detach its arguments"
        results = forward(*refused(message, arguments))
    elif needs_gradient(fake, cond, uncond, scales, x0, eps, alpha, sigma):
        with torch.no_grad():
            results = kernels(op, fake.device, fake.dtype, fake.numel()).forward(*arguments)
    else:
        results = kernels(op, fake.device, fake.dtype, fake.numel()).forward(*arguments)
    return ScoreGap(*results) if eps is not None else ScoreGap(results[0], results[1], None, None)


def forward(
    fake: Tensor,
    cond: Tensor,
    uncond: Tensor | None,
    guidance_scale: float,
    scale: float,
    scales: Tensor | None,
    mean_abs: bool,
    x0: Tensor | None,
    noise: Tensor | None,
    seed: int,
    stream: int,
    alpha: Tensor | None,
    sigma: Tensor | None,
    prediction_type: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradient in the dtype of `fake`, and [B] in the compute dtype: sum d^2, mean|r|, sum d r.

    The last two have no elements where `x0`, `noise`, `alpha` and `sigma` are None; otherwise all four are given.
    """
    guided = guide(cond, uncond, guidance_scale)
    gap = guided - fake.to(guided.dtype)
    gap_sq = sum_per_sample(gap.square())
    residual_abs = gap_dot_residual = gap_sq.new_empty(0)
    factor = scale if scales is None else per_sample(scales, fake)
    if x0 is not None and noise is not None and alpha is not None and sigma is not None:
        target = regression_target(PREDICTION_TYPES[prediction_type], x0, noise, seed, stream, alpha, sigma)
        residual = guided - target
        residual_abs = mean_abs_per_sample(residual)
        gap_dot_residual = sum_per_sample(gap * residual)
        if mean_abs:
            factor = factor / per_sample(residual_abs.clamp(min=MEAN_ABS_FLOOR), fake)
    return stored_like(factor * gap, fake), gap_sq, residual_abs, gap_dot_residual


def _shapes(fake: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *_, noise, _seed, _stream, _alpha, _sigma, _prediction_type = others
    gap_sq = fake.new_empty(fake.shape[0], dtype=compute_dtype(fake))
    of_target = gap_sq.new_empty(0 if noise is None else fake.shape[0])
    return torch.empty_like(fake), gap_sq, of_target, torch.empty_like(of_target)


register("score_gap", forward=forward)
availability.fake("score_gap", _shapes)
