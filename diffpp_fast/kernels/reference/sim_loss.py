"""m^2 Q / sqrt(m^2 sum d^2 + c^2) per sample, with Q = sum d r - sum d^2 and m the scale from outputs to scores."""

import torch
from torch import Tensor

from diffpp_fast.kernels.reference import compute_dtype, per_sample, sum_per_sample
from diffpp_fast.kernels.reference.philox import Address
from diffpp_fast.kernels.reference.prediction import regression_target, score_scale
from diffpp_fast.kernels.reference.score_gap import guide, route_gradients


def forward(
    fake: Tensor,
    cond: Tensor,
    uncond: Tensor | None,
    x0: Tensor,
    noise: Tensor | Address,
    alpha: Tensor,
    sigma: Tensor,
    guidance_scale: float,
    prediction_type: str,
    huber_c: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss [B] and what `backward` needs of the statistics: m^2 / n [B] and m^2 Q / n^2 [B]."""
    dtype = compute_dtype(fake)
    guided = guide(cond, uncond, guidance_scale)
    gap = guided - fake.to(dtype)
    residual = guided - regression_target(prediction_type, x0, noise, alpha, sigma)
    m_sq = score_scale(prediction_type, alpha.to(dtype), sigma.to(dtype)).square()
    norm = torch.sqrt(m_sq * sum_per_sample(gap.square()) + huber_c**2)
    excess = sum_per_sample(gap * (residual - gap))
    factor = m_sq / norm
    return factor * excess, factor, factor * excess / norm


def backward(
    grad_output: Tensor,
    factor: Tensor,
    shrink: Tensor,
    fake: Tensor,
    cond: Tensor,
    uncond: Tensor | None,
    x0: Tensor,
    noise: Tensor | Address,
    alpha: Tensor,
    sigma: Tensor,
    guidance_scale: float,
    prediction_type: str,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """The gradients of fake, cond, uncond and x0, each where `needs` says so."""
    guided = guide(cond, uncond, guidance_scale)
    gap = guided - fake.to(guided.dtype)
    residual = guided - regression_target(prediction_type, x0, noise, alpha, sigma)
    outer = per_sample(grad_output * factor, fake)
    through_residual = outer * gap
    through_gap = outer * (residual - (2.0 + per_sample(shrink, fake)) * gap)
    return route_gradients(
        through_gap, through_residual, fake, cond, uncond, x0, sigma, guidance_scale, prediction_type, needs
    )
