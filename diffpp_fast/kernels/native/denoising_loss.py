"""The denoising loss and its residual in one pass; the target is made on the fly, its noise drawn where it is used."""

import torch
from torch import Tensor
from torch.library import register_fake

from diffpp_fast.kernels.native import noise_arguments
from diffpp_fast.kernels.reference import compute_dtype
from diffpp_fast.kernels.reference.philox import Address
from diffpp_fast.kernels.reference.prediction import PREDICTION_TYPES

_ops = torch.ops.diffpp_fast


def forward(
    prediction: Tensor,
    x0: Tensor,
    noise: Tensor | Address,
    alpha: Tensor,
    sigma: Tensor,
    prediction_type: str,
    weight: Tensor | None,
    save_residual: bool,
) -> tuple[Tensor, Tensor | None]:
    loss, residual = _ops.denoising_loss.default(
        prediction,
        x0,
        *noise_arguments(noise),
        alpha,
        sigma,
        PREDICTION_TYPES.index(prediction_type),
        weight,
        save_residual,
    )
    return loss, residual if save_residual else None


def backward(grad_output: Tensor, residual: Tensor, weight: Tensor | None) -> Tensor:
    gradient: Tensor = _ops.denoising_loss_backward.default(grad_output, residual, weight)
    return gradient


@register_fake("diffpp_fast::denoising_loss")
def _(
    prediction: Tensor,
    x0: Tensor,
    noise: Tensor,
    seed: int,
    stream: int,
    alpha: Tensor,
    sigma: Tensor,
    prediction_type: int,
    weight: Tensor | None,
    save_residual: bool,
) -> tuple[Tensor, Tensor]:
    residual = torch.empty_like(prediction) if save_residual else prediction.new_empty(0)
    return prediction.new_empty((), dtype=compute_dtype(prediction)), residual


@register_fake("diffpp_fast::denoising_loss_backward")
def _(grad_output: Tensor, residual: Tensor, weight: Tensor | None) -> Tensor:
    return torch.empty_like(residual)
