"""The generator losses of SiD and SiD-LSG (Zhou et al., arXiv 2404.04057 and 2406.01561), and of SIM (Luo et al., arXiv
2410.16794) and Diff-Instruct* (arXiv 2410.20898), for any prediction type.

With d = guided - fake, r = guided - target and sums over the elements of a sample, they are

    SiD   |k| (sum d r - sid_alpha sum d^2) / mean|r|, with no gradient through mean|r|
    SIM   m^2 Q / n, with Q = sum d r - sum d^2 and n = sqrt(m^2 sum d^2 + huber_c^2)

where k and m are `gap_scale` and `score_scale` of `diffpp_fast.prediction`.
"""

from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from diffpp_fast import availability
from diffpp_fast.arguments import number, positive
from diffpp_fast.backends import kernels, register
from diffpp_fast.noise import Noise
from diffpp_fast.ops import checks
from diffpp_fast.ops.autograd import by_definition, needs_gradient, only_needed, recorded
from diffpp_fast.plain import compute_dtype, mean_abs_per_sample, per_sample, stored_like, sum_per_sample
from diffpp_fast.prediction import (
    MEAN_ABS_FLOOR,
    PREDICTION_TYPES,
    gap_scale,
    guide,
    regression_target,
    score_scale,
    target_slope,
)


def sid_loss(
    fake: Tensor,
    cond: Tensor,
    uncond: Tensor | None,
    x0: Tensor,
    noise: Noise | Tensor,
    alpha: Tensor,
    sigma: Tensor,
    *,
    guidance_scale: float,
    prediction_type: str = "epsilon",
    sid_alpha: float = 1.0,
) -> Tensor:
    """|k| (sum d r - sid_alpha sum d^2) / mean|r| per sample.

    d = guided - fake, r = guided - target, guided = uncond + guidance_scale (cond - uncond), sums over the elements;
    the target is as in `denoising_loss` and k as in `NoiseSchedule.gap_scale`. In terms of the x0 that the networks
    imply this is sum (X_guided - X_fake)(X_guided - x0) - sid_alpha sum (X_guided - X_fake)^2, over
    mean|x0 - X_guided|.

    Args:
        fake: [B, ...], the output of the fake network at (x_t, t).
        cond: [B, ...], the reference network's output with the prompt.
        uncond: [B, ...], its output without; may be None if guidance_scale is 1.
        x0: [B, ...], the generator's samples behind x_t.
        noise: the noise in x_t: a `Noise` of B samples, regenerated from its address, or eps itself.
        alpha: [B], the factor of x0 in x_t; not 0 for "epsilon".
        sigma: [B], the factor of the noise in x_t.
        guidance_scale: diffusers' convention, 1 is no guidance.
        prediction_type: "epsilon", "v_prediction", "flow_prediction" or "sample".
        sid_alpha: SiD's alpha.

    Returns:
        [B], float32 (float64 for float64 inputs). mean|r| is taken as at least 1e-6. A NaN in `fake` makes the sample's
        loss NaN, and the gradients at that element; one in `cond`, `uncond` or the target spoils the whole sample.

    Transforms:
        Kernels compute the loss and the gradients of `fake`, `cond`, `uncond` and `x0`, the last as far as the target
        holds it (all but "epsilon"). Plain torch computes gradients of `alpha`, `sigma` and a noise tensor, second
        derivatives, tangents (forward mode) and what `torch.func` makes of the operator, `vmap` among it. In all of
        them mean|r| is a constant, as SiD has it; else they are exact. Kept for the gradients are the inputs and |k| /
        mean|r|: the backward pass draws the noise again.

    Raises:
        TypeError: an argument is not a floating-point tensor, or not a number where one is due.
        ValueError: shapes, batch sizes or devices differ; a sample has no elements; `uncond` is missing; a number is
            not finite; unknown prediction type.
    """
    op = "sid_loss"
    sid_alpha = number(op, "sid_alpha", sid_alpha)
    given = _checked(op, fake, cond, uncond, x0, noise, alpha, sigma, guidance_scale, prediction_type)
    return _loss(op, given, sid_alpha)


def sim_loss(
    fake: Tensor,
    cond: Tensor,
    uncond: Tensor | None,
    x0: Tensor,
    noise: Noise | Tensor,
    alpha: Tensor,
    sigma: Tensor,
    *,
    guidance_scale: float,
    prediction_type: str = "epsilon",
    huber_c: float = 1.0,
) -> Tensor:
    """Q_b / sqrt(D_b + huber_c^2) per sample, in terms of scores: the pseudo-Huber distance of score implicit matching.

    D = sum (score_guided - score_fake)^2 and Q = sum (score_guided - score_fake)(score_fake - score_target), where a
    difference of scores is -m times a difference of outputs: m = 1/sigma for "epsilon", alpha/sigma for "v_prediction"
    and "flow_prediction", alpha/sigma^2 for "sample". In terms of outputs, with d = guided - fake and
    r = guided - target, the loss is m^2 (sum d r - sum d^2) / sqrt(m^2 sum d^2 + huber_c^2). Multiply the result by
    w(t) for a weighted one.

    Args:
        fake: [B, ...], the output of the fake network at (x_t, t).
        cond: [B, ...], the reference network's output with the prompt.
        uncond: [B, ...], its output without; may be None if guidance_scale is 1.
        x0: [B, ...], the generator's samples behind x_t.
        noise: the noise in x_t: a `Noise` of B samples, regenerated from its address, or eps itself.
        alpha: [B], the factor of x0 in x_t.
        sigma: [B], the factor of the noise in x_t; not 0.
        guidance_scale: diffusers' convention, 1 is no guidance.
        prediction_type: "epsilon", "v_prediction", "flow_prediction" or "sample".
        huber_c: the distance, in units of the whole sample's score, where squared turns into absolute; positive.

    Returns:
        [B], float32 (float64 for float64 inputs). What is not finite spoils its whole sample, and its gradients.

    Transforms:
        Kernels compute the loss and the gradients of `fake`, `cond`, `uncond` and `x0`, the last as far as the target
        holds it (all but "epsilon"). Plain torch computes gradients of `alpha`, `sigma` and a noise tensor, second
        derivatives, tangents (forward mode) and what `torch.func` makes of the operator, `vmap` among it; all are
        exact. Kept for the gradients are the inputs and two numbers a sample: the backward pass draws the noise again.

    Raises:
        TypeError: an argument is not a floating-point tensor, or not a number where one is due.
        ValueError: shapes, batch sizes or devices differ; a sample has no elements; `uncond` is missing; unknown
            prediction type; huber_c is not positive and finite, or guidance_scale not finite.
    """
    op = "sim_loss"
    given = _checked(op, fake, cond, uncond, x0, noise, alpha, sigma, guidance_scale, prediction_type)
    return _loss(op, given, positive(op, "huber_c", huber_c))


class Given(NamedTuple):
    """The arguments that the registered operators of both losses have, in their order."""

    fake: Tensor  # [B, ...], as cond, uncond, x0 and eps
    cond: Tensor
    uncond: Tensor | None
    x0: Tensor
    noise: Tensor  # noise, seed and stream are as in `diffpp_fast.philox`
    seed: int
    stream: int
    alpha: Tensor  # [B]
    sigma: Tensor  # [B]
    guidance_scale: float
    prediction_type: int  # an index into PREDICTION_TYPES

    @property
    def kind(self) -> str:
        return PREDICTION_TYPES[self.prediction_type]

    def scale(self, of: Any) -> Tensor:
        """k or m [B] in the compute dtype, by `gap_scale` or `score_scale`."""
        dtype = compute_dtype(self.fake)
        scale: Tensor = of(self.kind, self.alpha.to(dtype), self.sigma.to(dtype))
        return scale

    def gap_and_residual(self) -> tuple[Tensor, Tensor]:
        """Return d and r."""
        guided = guide(self.cond, self.uncond, self.guidance_scale)
        address = self.noise, self.seed, self.stream
        target = regression_target(self.kind, self.x0, *address, self.alpha, self.sigma)
        return guided - self.fake.to(guided.dtype), guided - target


def sid_forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Return the loss [B] and what the gradients need of the statistics: |k| / mean|r| [B]."""
    *given, sid_alpha = arguments
    outputs = Given(*given)
    gap, residual = outputs.gap_and_residual()
    factor = outputs.scale(gap_scale).abs() / mean_abs_per_sample(residual).detach().clamp(min=MEAN_ABS_FLOOR)
    return factor * sum_per_sample(gap * (residual - sid_alpha * gap)), factor


def sid_backward(grad_output: Tensor, factor: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """Return the gradients of fake, cond, uncond and x0; one that is not needed has no elements."""
    *given, sid_alpha, needs_fake, needs_cond, needs_uncond, needs_x0 = arguments
    outputs = Given(*given)
    gap, residual = outputs.gap_and_residual()
    outer = per_sample(grad_output * factor, gap)
    through_gap = outer * (residual - 2.0 * sid_alpha * gap)
    return _routed(through_gap, outer * gap, outputs, (needs_fake, needs_cond, needs_uncond, needs_x0))


def sim_forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss [B] and what the gradients need of the statistics: m^2 / n [B] and m^2 Q / n^2 [B]."""
    *given, huber_c = arguments
    outputs = Given(*given)
    gap, residual = outputs.gap_and_residual()
    m_sq = outputs.scale(score_scale).square()
    norm = torch.sqrt(m_sq * sum_per_sample(gap.square()) + huber_c**2)
    factor = m_sq / norm
    loss = factor * sum_per_sample(gap * (residual - gap))
    return loss, factor, loss / norm


def sim_backward(grad_output: Tensor, factor: Tensor, shrink: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """Return the gradients of fake, cond, uncond and x0; one that is not needed has no elements."""
    *given, needs_fake, needs_cond, needs_uncond, needs_x0 = arguments
    outputs = Given(*given)
    gap, residual = outputs.gap_and_residual()
    outer = per_sample(grad_output * factor, gap)
    through_gap = outer * (residual - (2.0 + per_sample(shrink, gap)) * gap)
    return _routed(through_gap, outer * gap, outputs, (needs_fake, needs_cond, needs_uncond, needs_x0))


def _routed(
    through_gap: Tensor, through_residual: Tensor, outputs: Given, needs: tuple[bool, ...]
) -> tuple[Tensor, ...]:
    """From dL/dd and dL/dr to the gradients of fake, cond, uncond and x0, each where `needs` says so.

    d = o_g - fake, r = o_g - o*, o_g = w cond + (1 - w) uncond, and o* moves with x0 unless the target is eps.
    """
    through_guided = through_gap + through_residual
    w = 1.0 if outputs.uncond is None else outputs.guidance_scale
    slope = target_slope(outputs.kind, per_sample(outputs.sigma, outputs.x0))
    factors = ((-1.0, through_gap), (w, through_guided), (1.0 - w, through_guided), (-slope, through_residual))
    inputs = outputs.fake, outputs.cond, outputs.uncond, outputs.x0
    return tuple(
        stored_like(factor * through, like) if needed and like is not None else through.new_empty(0)
        for (factor, through), like, needed in zip(factors, inputs, needs, strict=True)
    )


_DEFINITIONS = {
    "sid_loss": SimpleNamespace(forward=sid_forward, backward=sid_backward),
    "sim_loss": SimpleNamespace(forward=sim_forward, backward=sim_backward),
}


def _checked(
    op: str,
    fake: Tensor,
    cond: Tensor,
    uncond: Tensor | None,
    x0: Tensor,
    noise: Noise | Tensor,
    alpha: Tensor,
    sigma: Tensor,
    guidance_scale: float,
    prediction_type: str,
) -> Given:
    kind = checks.prediction_type(op, prediction_type)
    large = {"fake": fake, "cond": cond, "uncond": uncond, "x0": x0}
    checks.floating(op, {**large, "alpha": alpha, "sigma": sigma}, optional=("uncond",))
    checks.same_shape(op, large)
    checks.per_sample(op, fake.shape[0], {"alpha": alpha, "sigma": sigma})
    checks.elements(op, "fake", fake)
    w = checks.guidance(op, uncond, guidance_scale)
    eps, seed, stream = checks.address(op, noise, x0)
    x0 = checks.target_x0(prediction_type, x0, fake)
    fake, cond, uncond, x0, eps = checks.promoted(fake, cond, uncond, x0, eps)
    return Given(fake, cond, uncond, x0, eps, seed, stream, alpha, sigma, w, kind)


def _loss(op: str, given: Given, option: float) -> Tensor:
    """Return the loss [B]; `option` is sid_alpha or huber_c."""
    loss: Tensor
    fake = given.fake
    if by_definition(given.noise, given.alpha, given.sigma):
        loss, *_ = _DEFINITIONS[op].forward(*given, option)
    elif needs_gradient(fake, given.cond, given.uncond, given.x0):
        loss = _GapLoss.apply(*given[:4], (*given[4:], option), op)
    else:
        loss, *_ = kernels(op, fake.device, fake.dtype).forward(*given, option)
    return loss


class _GapLoss(Function):
    @staticmethod
    def forward(
        ctx: Any, fake: Tensor, cond: Tensor, uncond: Tensor | None, x0: Tensor, others: tuple[Any, ...], op: str
    ) -> Tensor:
        noise, seed, stream, alpha, sigma, *numbers = others
        ctx.op = op
        ctx.kernels = kernels(ctx.op, fake.device, fake.dtype)
        ctx.numbers = seed, stream, *numbers
        loss: Tensor
        loss, *statistics = ctx.kernels.forward(fake, cond, uncond, x0, *others)
        ctx.save_for_backward(fake, cond, uncond, x0, noise, alpha, sigma, *statistics)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        fake, cond, uncond, x0, noise, alpha, sigma, *statistics = ctx.saved_tensors
        seed, stream, *numbers = ctx.numbers
        arguments = (fake, cond, uncond, x0, noise, seed, stream, alpha, sigma, *numbers)
        differentiate = ctx.kernels.backward
        if recorded(grad_output):
            definition = _DEFINITIONS[ctx.op]
            differentiate = definition.backward
            _, *statistics = definition.forward(*arguments)  # which depend on the outputs
        if ctx.op == "sim_loss":
            arguments = arguments[:-1]  # huber_c is in the statistics
        needs = ctx.needs_input_grad[:4]
        gradients = differentiate(grad_output, *statistics, *arguments, *needs)
        return (*only_needed(gradients, needs), None, None)


def _statistic_shapes(fake: Tensor, count: int) -> tuple[Tensor, ...]:
    return tuple(fake.new_empty(fake.shape[0], dtype=compute_dtype(fake)) for _ in range(count))


def _gradient_shapes(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, needs = arguments[:4], arguments[-4:]
    return tuple(
        torch.empty_like(like) if needed and like is not None else arguments[0].new_empty(0)
        for like, needed in zip(inputs, needs, strict=True)
    )


_TRITON = f"{__package__}.triton.gap_loss"
register("sid_loss", triton=f"{_TRITON}:sid", cuda=False, forward=sid_forward, backward=sid_backward)
register("sim_loss", triton=f"{_TRITON}:sim", cuda=False, forward=sim_forward, backward=sim_backward)
availability.fake("sid_loss", lambda fake, *others: _statistic_shapes(fake, 2))
availability.fake("sim_loss", lambda fake, *others: _statistic_shapes(fake, 3))
availability.fake("sid_loss_backward", lambda grad_output, factor, *others: _gradient_shapes(*others))
availability.fake("sim_loss_backward", lambda grad_output, factor, shrink, *others: _gradient_shapes(*others))
