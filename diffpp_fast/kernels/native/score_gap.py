"""The score gap, its statistics and its normaliser, without temporaries."""

import torch
from torch import Tensor
from torch.library import register_fake

from diffpp_fast.kernels.native import noise_arguments
from diffpp_fast.kernels.reference import compute_dtype
from diffpp_fast.kernels.reference.philox import Address
from diffpp_fast.kernels.reference.prediction import PREDICTION_TYPES

_ops = torch.ops.diffpp_fast


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
    number, scales = (1.0, scale) if isinstance(scale, Tensor) else (scale, None)
    gradient, gap_sq, residual_abs, gap_dot_residual = _ops.score_gap.default(
        fake,
        cond,
        uncond,
        guidance_scale,
        number,
        scales,
        mean_abs_normalizer,
        x0,
        *((None, 0, 0) if noise is None else noise_arguments(noise)),
        alpha,
        sigma,
        PREDICTION_TYPES.index(prediction_type),
    )
    return (gradient, gap_sq, None, None) if noise is None else (gradient, gap_sq, residual_abs, gap_dot_residual)


@register_fake("diffpp_fast::score_gap")
def _(
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
    dtype = compute_dtype(fake)
    batch = fake.shape[0]
    of_target = 0 if x0 is None else batch
    return (
        torch.empty_like(fake),
        fake.new_empty(batch, dtype=dtype),
        fake.new_empty(of_target, dtype=dtype),
        fake.new_empty(of_target, dtype=dtype),
    )
