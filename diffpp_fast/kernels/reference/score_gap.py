"""d = guided - fake, scaled and normalised per sample, with the statistics of d and of the residual r."""

from torch import Tensor

from diffpp_fast.kernels.reference import compute_dtype, per_sample, stored_like, sum_per_sample
from diffpp_fast.kernels.reference.philox import Address
from diffpp_fast.kernels.reference.prediction import regression_target, target_slope

# mean|r| is of order one; below this the guided prediction is its target, and d has no direction to normalise.
MEAN_ABS_FLOOR = 1e-6


def forward(
    fake: Tensor,
    cond: Tensor,
    uncond: Tensor | None,
    guidance_scale: float,
    scale: float | Tensor,
    mean_abs_normalizer: bool,
    x0: Tensor | None,
    noise: Tensor | Address | None,
    alpha: Tensor | None,
    sigma: Tensor | None,
    prediction_type: str,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """gradient [B, ...] in the dtype of `fake`, and [B] in the compute dtype: sum d^2, mean|r|, sum d r.

    The last two are None where `x0`, `noise`, `alpha` and `sigma` are; otherwise all four are given.
    """
    guided = guide(cond, uncond, guidance_scale)
    gap = guided - fake.to(guided.dtype)
    gap_sq = sum_per_sample(gap.square())
    residual_abs = gap_dot_residual = None
    factor = per_sample(scale, fake) if isinstance(scale, Tensor) else scale
    if x0 is not None and noise is not None and alpha is not None and sigma is not None:
        residual = guided - regression_target(prediction_type, x0, noise, alpha, sigma)
        residual_abs = mean_abs(residual)
        gap_dot_residual = sum_per_sample(gap * residual)
        if mean_abs_normalizer:
            factor = factor / per_sample(residual_abs.clamp(min=MEAN_ABS_FLOOR), fake)
    return stored_like(factor * gap, fake), gap_sq, residual_abs, gap_dot_residual


def guide(cond: Tensor, uncond: Tensor | None, guidance_scale: float) -> Tensor:
    """uncond + w (cond - uncond) in the compute dtype; cond itself where there is no `uncond`."""
    dtype = compute_dtype(cond)
    if uncond is None:
        return cond.to(dtype)
    return uncond.to(dtype) + guidance_scale * (cond.to(dtype) - uncond.to(dtype))


def mean_abs(residual: Tensor) -> Tensor:
    """[B, ...] -> [B]."""
    return sum_per_sample(residual.abs()) / residual[:1].numel()


def route_gradients(
    through_gap: Tensor,
    through_residual: Tensor,
    fake: Tensor,
    cond: Tensor,
    uncond: Tensor | None,
    x0: Tensor,
    sigma: Tensor,
    guidance_scale: float,
    prediction_type: str,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """From dL/dd and dL/dr to the gradients of fake, cond, uncond and x0, each where `needs` says so.

    d = o_g - fake, r = o_g - o*, o_g = w cond + (1 - w) uncond, and o* moves with x0 unless the target is eps.
    """
    needs_fake, needs_cond, needs_uncond, needs_x0 = needs
    through_guided = through_gap + through_residual
    w = 1.0 if uncond is None else guidance_scale
    slope = target_slope(prediction_type, per_sample(sigma, x0))
    return (
        stored_like(-through_gap, fake) if needs_fake else None,
        stored_like(w * through_guided, cond) if needs_cond else None,
        stored_like((1.0 - w) * through_guided, uncond) if needs_uncond and uncond is not None else None,
        stored_like(-slope * through_residual, x0) if needs_x0 else None,
    )
