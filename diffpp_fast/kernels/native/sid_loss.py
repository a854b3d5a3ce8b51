"""SiD's loss in one pass, and all its gradients in another."""

import torch
from torch import Tensor
from torch.library import register_fake

from diffpp_fast.kernels.native import noise_arguments
from diffpp_fast.kernels.native.outputs import gradients_like, only_needed
from diffpp_fast.kernels.reference import compute_dtype
from diffpp_fast.kernels.reference.philox import Address
from diffpp_fast.kernels.reference.prediction import PREDICTION_TYPES

_ops = torch.ops.diffpp_fast


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
    results: tuple[Tensor, Tensor] = _ops.sid_loss.default(
        fake,
        cond,
        uncond,
        x0,
        *noise_arguments(noise),
        alpha,
        sigma,
        guidance_scale,
        PREDICTION_TYPES.index(prediction_type),
        sid_alpha,
    )
    return results


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
    gradients = _ops.sid_loss_backward.default(
        grad_output,
        factor,
        fake,
        cond,
        uncond,
        x0,
        *noise_arguments(noise),
        alpha,
        sigma,
        guidance_scale,
        PREDICTION_TYPES.index(prediction_type),
        sid_alpha,
        *needs,
    )
    return only_needed(gradients, needs)


@register_fake("diffpp_fast::sid_loss")
def _(
    fake: Tensor,
    cond: Tensor,
    uncond: Tensor | None,
    x0: Tensor,
    noise: Tensor,
    seed: int,
    stream: int,
    alpha: Tensor,
    sigma: Tensor,
    guidance_scale: float,
    prediction_type: int,
    sid_alpha: float,
) -> tuple[Tensor, Tensor]:
    loss = fake.new_empty(fake.shape[0], dtype=compute_dtype(fake))
    return loss, torch.empty_like(loss)


@register_fake("diffpp_fast::sid_loss_backward")
def _(
    grad_output: Tensor,
    factor: Tensor,
    fake: Tensor,
    cond: Tensor,
    uncond: Tensor | None,
    x0: Tensor,
    noise: Tensor,
    seed: int,
    stream: int,
    alpha: Tensor,
    sigma: Tensor,
    guidance_scale: float,
    prediction_type: int,
    sid_alpha: float,
    needs_fake: bool,
    needs_cond: bool,
    needs_uncond: bool,
    needs_x0: bool,
) -> tuple[Tensor, ...]:
    return gradients_like(fake, cond, uncond, x0, (needs_fake, needs_cond, needs_uncond, needs_x0))
