"""The gradient of Diff-Instruct++ and its relatives on the generator's sample, with the statistics of the score gap."""

import math
from typing import Any, NamedTuple, overload

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

    Attributes:
        gradient: [B, ...], scale_b * d / N_b.
        gap_sq: [B], sum d^2.
        residual_abs: [B], mean |r|; None without a target.
        gap_dot_residual: [B], sum d r; None without a target.
    """

    gradient: Tensor
    gap_sq: Tensor
    residual_abs: Tensor | None
    gap_dot_residual: Tensor | None


class RewardedScoreGap(NamedTuple):
    """The result of `score_gap` with a reward score s: that of `ScoreGap`, and the statistics of s.

    Attributes:
        gradient: [B, ...], (scale_b * d - reward_share_b * reward_scale_b * s) / N_b.
        gap_sq: [B], sum d^2.
        residual_abs: [B], mean |r|; None without a target.
        gap_dot_residual: [B], sum d r; None without a target.
        reward_sq: [B], sum s^2.
        gap_dot_reward: [B], sum d s.
        reward_share: [B], of the reward's term that is left: below 1 where clipped, 0 where it is not finite.
    """

    gradient: Tensor
    gap_sq: Tensor
    residual_abs: Tensor | None
    gap_dot_residual: Tensor | None
    reward_sq: Tensor
    gap_dot_reward: Tensor
    reward_share: Tensor


@overload
def score_gap(*outputs: Tensor | None, reward_score: None = None, **options: Any) -> ScoreGap: ...


@overload
def score_gap(*outputs: Tensor | None, reward_score: Tensor, **options: Any) -> RewardedScoreGap: ...


def score_gap(  # type: ignore[misc]  # whose other arguments the overloads leave out
    fake: Tensor,
    cond: Tensor,
    uncond: Tensor | None = None,
    *,
    guidance_scale: float | None = None,
    scale: float | Tensor = 1.0,
    normalizer: str | None = None,
    reward_score: Tensor | None = None,
    reward_scale: float | Tensor | None = None,
    reward_clip: float | None = None,
    x0: Tensor | None = None,
    noise: Noise | Tensor | None = None,
    alpha: Tensor | None = None,
    sigma: Tensor | None = None,
    prediction_type: str = "epsilon",
) -> ScoreGap | RewardedScoreGap:
    """scale_b * d / N_b with d = guided - fake and guided = uncond + guidance_scale (cond - uncond).

    With scale = `NoiseSchedule.gap_scale(t)` the gradient is the difference of implied x0, fake minus guided: that of
    Diff-Instruct. With scale = sign of it and normalizer "mean_abs" it is that of DMD. With a reward score s it is
    (scale_b * d - reward_scale_b * s) / N_b, that of DIDR.

    Args:
        fake: [B, ...], the output of the fake (teaching-assistant) network at (x_t, t).
        cond: [B, ...], the reference network's output with the prompt.
        uncond: [B, ...], its output without; may be None if guidance_scale is 1.
        guidance_scale: diffusers' convention, 1 is no guidance. None is 1; with `uncond` it has to be stated.
        scale: a number, or [B].
        normalizer: None for N = 1, "mean_abs" for N = mean|r|, taken as at least 1e-6 so that the gradient stays
            finite where guided equals the target.
        reward_score: [B, ...], s, the gradient of a reward by x_t.
        reward_scale: a number (None: 1), or [B]. A sample whose |reward_scale| ||s|| is not finite has no reward term,
            so that NaN leaves one out; nothing changes for the others.
        reward_clip: the most that the norm of a sample's reward term may be, in norms of its scale_b * d: a longer one
            is shortened, in its direction. None: as long as it is.
        x0, noise, alpha, sigma: the sample, the noise and the coefficients [B] behind x_t, all four or none. They
            make the target of `prediction_type`, as in `denoising_loss`; "mean_abs" needs them.
        prediction_type: "epsilon", "v_prediction", "flow_prediction" or "sample".

    Returns:
        `ScoreGap(gradient, gap_sq, residual_abs, gap_dot_residual)`: the gradient in the common dtype of the large
        tensors and the memory format of `fake`, the statistics per sample, the last two None without a target. With a
        reward score `RewardedScoreGap`: `reward_sq`, `gap_dot_reward` and `reward_share` follow. A NaN in an output
        makes the sample's statistics NaN, and the gradient at that element, with "mean_abs" at every element of the
        sample.

    Transforms:
        Nothing is differentiable: the outputs are constants that carry no graph, as `detach` has it. Where they would
        vanish unseen, a derivative by an argument raises: a tangent (forward mode), or that of `torch.func`. There
        detach the arguments. `vmap` is exact.

    Raises:
        TypeError: an argument is not a floating-point tensor, or not a number where one is due.
        ValueError: shapes, batch sizes or devices differ; a sample has no elements; `uncond` is given without
            guidance_scale, or is missing; a number is not finite; the target is missing or incomplete; reward_clip is
            not above 0; reward_scale or reward_clip is given without reward_score; unknown normalizer or prediction
            type.
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
    of_reward = _reward(op, fake, reward_score, reward_scale, reward_clip)
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
    if of_reward:
        fake, cond, uncond, x0, eps, score = checks.promoted(fake, cond, uncond, x0, eps, of_reward[0])
        of_reward = score, *of_reward[1:]
    mean_abs = normalizer == "mean_abs"
    of_target = (x0, eps, seed, stream, alpha, sigma, kind)
    arguments = (fake, cond, uncond, guidance_scale, scale, scales, mean_abs, *of_target, *of_reward)
    function = "score_gap_with_reward" if of_reward else "forward"
    if transforms.active():
        message = f"{op} is not differentiable, its outputs are constants: detach its arguments"
        results = _DEFINITION[function](*refused(message, arguments))
    elif needs_gradient(fake, cond, uncond, scales, x0, eps, alpha, sigma, *of_reward):
        with torch.no_grad():
            results = getattr(kernels(op, fake.device, fake.dtype, fake.numel()), function)(*arguments)
    else:
        results = getattr(kernels(op, fake.device, fake.dtype, fake.numel()), function)(*arguments)
    gradient, gap_sq, residual_abs, gap_dot_residual, *others = results
    if eps is None:
        residual_abs = gap_dot_residual = None
    if others:
        return RewardedScoreGap(gradient, gap_sq, residual_abs, gap_dot_residual, *others)
    return ScoreGap(gradient, gap_sq, residual_abs, gap_dot_residual)


def _reward(
    op: str, fake: Tensor, score: Tensor | None, scale: float | Tensor | None, clip: float | None
) -> tuple[Any, ...]:
    """Return the last arguments of `score_gap_with_reward`; nothing without a reward score."""
    if score is None:
        for name, value in (("reward_scale", scale), ("reward_clip", clip)):
            if value is not None:
                raise ValueError(f"{op}: {name} is given without reward_score")
        return ()
    scale, scales = (
        (1.0, scale)
        if isinstance(scale, Tensor)
        else (number(op, "reward_scale", 1.0 if scale is None else scale), None)
    )
    checks.floating(op, {"fake": fake, "reward_score": score, "reward_scale": scales}, optional=("reward_scale",))
    checks.same_shape(op, {"fake": fake, "reward_score": score})
    # Of any values: one that is not finite leaves its sample without a reward term.
    if scales is not None and scales.shape != fake.shape[:1]:
        raise ValueError(f"{op}: reward_scale must have shape [B] = [{len(fake)}], got {list(scales.shape)}")
    if clip is not None and number(op, "reward_clip", clip) <= 0.0:
        raise ValueError(f"{op}: reward_clip must be above 0, or None, got {clip}")
    return score, scale, scales, math.inf if clip is None else float(clip)


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
    of_target = x0, noise, seed, stream, alpha, sigma, prediction_type
    gap, divisor, *statistics = _parts(fake, cond, uncond, guidance_scale, mean_abs, *of_target)
    factor = _factor(scale, scales, fake)
    gap_sq, residual_abs, gap_dot_residual = statistics
    return stored_like(factor / divisor * gap, fake), gap_sq, residual_abs, gap_dot_residual


def score_gap_with_reward(
    fake: Tensor,
    cond: Tensor,
    uncond: Tensor | None,
    guidance_scale: float,
    scale: float,
    scales: Tensor | None,
    mean_abs: bool,
    *others: Any,
) -> tuple[Tensor, ...]:
    """Return what `forward` does, the gradient less a reward's term, and [B]: sum s^2, sum d s, the share of the term.

    Four arguments follow those of `forward`: reward_score [B, ...], reward_scale, reward_scales, which are [B] or None
    as `scales` are, and reward_clip, infinity for none.
    """
    *of_target, score, reward_scale, reward_scales, clip = others
    gap, divisor, *statistics = _parts(fake, cond, uncond, guidance_scale, mean_abs, *of_target)
    factor, reward_factor = _factor(scale, scales, fake), _factor(reward_scale, reward_scales, fake)
    score = score.to(gap.dtype)
    reward_sq, gap_dot_reward = sum_per_sample(score.square()), sum_per_sample(gap * score)
    length = (reward_factor * per_sample(reward_sq.sqrt(), fake)).abs()
    limit = clip * (factor * per_sample(statistics[0].sqrt(), fake)).abs()
    finite = length.isfinite()
    share = torch.where(length > limit, limit / length, 1.0).where(finite, 0.0)
    term = (share * reward_factor * score).where(finite, 0.0)
    gradient = stored_like((factor * gap - term) / divisor, fake)
    return gradient, *statistics, reward_sq, gap_dot_reward, share.flatten()


def _parts(
    fake: Tensor,
    cond: Tensor,
    uncond: Tensor | None,
    guidance_scale: float,
    mean_abs: bool,
    x0: Tensor | None,
    noise: Tensor | None,
    seed: int,
    stream: int,
    alpha: Tensor | None,
    sigma: Tensor | None,
    prediction_type: int,
) -> tuple[Tensor, float | Tensor, Tensor, Tensor, Tensor]:
    """Return d, N, and the statistics of d and r."""
    guided = guide(cond, uncond, guidance_scale)
    gap = guided - fake.to(guided.dtype)
    gap_sq = sum_per_sample(gap.square())
    residual_abs = gap_dot_residual = gap_sq.new_empty(0)
    divisor: float | Tensor = 1.0
    if x0 is not None and noise is not None and alpha is not None and sigma is not None:
        target = regression_target(PREDICTION_TYPES[prediction_type], x0, noise, seed, stream, alpha, sigma)
        residual = guided - target
        residual_abs = mean_abs_per_sample(residual)
        gap_dot_residual = sum_per_sample(gap * residual)
        if mean_abs:
            divisor = per_sample(residual_abs.clamp(min=MEAN_ABS_FLOOR), fake)
    return gap, divisor, gap_sq, residual_abs, gap_dot_residual


def _factor(scale: float, scales: Tensor | None, like: Tensor) -> float | Tensor:
    return scale if scales is None else per_sample(scales, like)


_DEFINITION: dict[str, Any] = {"forward": forward, "score_gap_with_reward": score_gap_with_reward}


def _shapes(fake: Tensor, *others: Any) -> tuple[Tensor, ...]:
    has_target = others[7] is not None  # the noise
    gap_sq = fake.new_empty(fake.shape[0], dtype=compute_dtype(fake))
    of_target = gap_sq.new_empty(fake.shape[0] if has_target else 0)
    return torch.empty_like(fake), gap_sq, of_target, torch.empty_like(of_target)


def _shapes_with_reward(fake: Tensor, *others: Any) -> tuple[Tensor, ...]:
    results = _shapes(fake, *others)
    return *results, *(torch.empty_like(results[1]) for _ in range(3))


register("score_gap", **_DEFINITION)
availability.fake("score_gap", _shapes)
availability.fake("score_gap_with_reward", _shapes_with_reward)
