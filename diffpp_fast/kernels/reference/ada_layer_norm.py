"""Layer normalisation without parameters, scaled and shifted per sample."""

import torch
from torch import Tensor

from diffpp_fast.kernels.reference import compute_dtype, stored_like


def forward(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The output, and each row's mean and 1 / sqrt(variance + eps): [B, rows] in the compute dtype."""
    rows = _rows(x)
    mean = rows.mean(dim=2)
    centered = rows - mean[:, :, None]
    rstd = torch.rsqrt(centered.square().mean(dim=2) + eps)
    y = centered * rstd[:, :, None] * (1.0 + scale.to(rows.dtype)[:, None]) + shift.to(rows.dtype)[:, None]
    return stored_like(y.reshape(x.shape), x), mean, rstd


def backward(
    grad_output: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, scale: Tensor, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x, scale and shift, each where `needs` says so."""
    normalized = (_rows(x) - mean[:, :, None]) * rstd[:, :, None]
    grad = _rows(grad_output)
    needs_x, needs_scale, needs_shift = needs
    grad_x = None
    if needs_x:
        g = grad * (1.0 + scale.to(grad.dtype)[:, None])
        g_mean = g.mean(dim=2, keepdim=True)
        gn_mean = (g * normalized).mean(dim=2, keepdim=True)
        grad_x = stored_like((rstd[:, :, None] * (g - g_mean - normalized * gn_mean)).reshape(x.shape), x)
    return (
        grad_x,
        (grad * normalized).sum(dim=1).to(scale.dtype) if needs_scale else None,
        grad.sum(dim=1).to(scale.dtype) if needs_shift else None,
    )


def _rows(x: Tensor) -> Tensor:
    """[B, ..., D] -> [B, rows, D] in the compute dtype."""
    return x.to(compute_dtype(x)).reshape(x.shape[0], x.shape[1:-1].numel(), x.shape[-1])
