"""The gradient of Diff-Instruct++ and its relatives on the generator's sample, with the statistics of the score gap."""

from typing import NamedTuple

import torch
from torch import Tensor

from diffpp_fast import transforms
from diffpp_fast.arguments import number
from diffpp_fast.kernels import dispatch
from diffpp_fast.kernels.reference import score_gap as definition
from diffpp_fast.noise import Noise
from diffpp_fast.ops import checks
from diffpp_fast.ops.autograd import needs_gradient, refused

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
    checks.prediction_type(op, prediction_type)
    checks.one_of(op, "normalizer", normalizer, NORMALIZERS)
    if isinstance(scale, Tensor):
        scale_tensor = scale
    else:
        scale_tensor, scale = None, number(op, "scale", scale)
    checks.floating(
        op,
        {"fake": fake, "cond": cond, "uncond": uncond, "x0": x0, "alpha": alpha, "sigma": sigma, "scale": scale_tensor},
        optional=("uncond", "x0", "alpha", "sigma", "scale"),
    )
    checks.same_shape(op, {"fake": fake, "cond": cond, "uncond": uncond, "x0": x0})
    checks.per_sample(op, fake.shape[0], {"alpha": alpha, "sigma": sigma, "scale": scale_tensor})
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

    eps = None if noise is None else checks.noise(op, noise, fake)
    x0 = None if x0 is None else checks.target_x0(prediction_type, x0, fake)
    dtype = checks.common_dtype(fake, cond, uncond, x0, eps)
    arguments = (
        checks.cast(fake, dtype),
        checks.cast(cond, dtype),
        checks.cast(uncond, dtype),
        guidance_scale,
        scale,
        normalizer == "mean_abs",
        checks.cast(x0, dtype),
        checks.cast(eps, dtype),
        alpha,
        sigma,
        prediction_type,
    )
    if transforms.active():
        message = f"{op} is not differentiable, its outputs are constants: detach its arguments"
        return ScoreGap(*definition.forward(*refused(message, arguments)))
    kernels = dispatch.select(op, fake.device, dtype)
    if not needs_gradient(*arguments):
        return ScoreGap(*kernels.forward(*arguments))
    with torch.no_grad():
        return ScoreGap(*kernels.forward(*arguments))
