"""|k| (sum d r - sid_alpha sum d^2) / mean|r| per sample, with no gradient through mean|r|."""

from torch import Tensor

from diffpp_fast.kernels.reference import compute_dtype, per_sample, sum_per_sample
from diffpp_fast.kernels.reference.philox import Address
from diffpp_fast.kernels.reference.prediction import gap_scale, regression_target
from diffpp_fast.kernels.reference.score_gap import MEAN_ABS_FLOOR, guide, mean_abs, route_gradients


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
    sid_alpha: float,
) -> tuple[Tensor, Tensor]:
    """The loss [B] and what `backward` needs of the statistics: |k| / mean|r| [B]."""
    dtype = compute_dtype(fake)
    guided = guide(cond, uncond, guidance_scale)
    gap = guided - fake.to(dtype)
    residual = guided - regression_target(prediction_type, x0, noise, alpha, sigma)
    k = gap_scale(prediction_type, alpha.to(dtype), sigma.to(dtype))
    factor = k.abs() / mean_abs(residual).detach().clamp(min=MEAN_ABS_FLOOR)
    return factor * sum_per_sample(gap * (residual - sid_alpha * gap)), factor


def backward(
    grad_output: Tensor,
    factor: Tensor,
    fake: Tensor,
    cond: Tensor,
    uncond: Tensor | None,
    x0: Tensor,
    noise: Tensor | Address,
    alpha: Tensor,
    sigma: Tensor,
    guidance_scale: float,
    prediction_type: str,
    sid_alpha: float,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """The gradients of fake, cond, uncond and x0, each where `needs` says so."""
    guided = guide(cond, uncond, guidance_scale)
    gap = guided - fake.to(guided.dtype)
    residual = guided - regression_target(prediction_type, x0, noise, alpha, sigma)
    outer = per_sample(grad_output * factor, fake)
    through_residual = outer * gap
    through_gap = outer * (residual - 2.0 * sid_alpha * gap)
    return route_gradients(
        through_gap, through_residual, fake, cond, uncond, x0, sigma, guidance_scale, prediction_type, needs
    )
