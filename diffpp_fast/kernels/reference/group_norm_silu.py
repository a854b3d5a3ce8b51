"""Group normalisation followed by SiLU or nothing."""

import torch
from torch import Tensor

from diffpp_fast.kernels.reference import compute_dtype, stored_like


def forward(
    x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The output, and each group's mean and 1 / sqrt(variance + eps): [B, num_groups] in the compute dtype."""
    groups = _grouped(x, num_groups)
    mean = groups.mean(dim=2)
    centered = groups - mean[:, :, None]
    # Two passes: E[x^2] - E[x]^2 loses the variance where the mean is large.
    rstd = torch.rsqrt(centered.square().mean(dim=2) + eps)
    normalized = (centered * rstd[:, :, None]).reshape(x.shape)
    y = _affine(normalized, weight, bias)
    return stored_like(y * torch.sigmoid(y) if activation == "silu" else y, x), mean, rstd


def backward(
    grad_output: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x, weight and bias, each where `needs` says so."""
    num_groups = mean.shape[1]
    normalized = ((_grouped(x, num_groups) - mean[:, :, None]) * rstd[:, :, None]).reshape(x.shape)
    grad_y = grad_output.to(normalized.dtype)
    if activation == "silu":
        y = _affine(normalized, weight, bias)
        sigmoid = torch.sigmoid(y)
        grad_y = grad_y * sigmoid * (1.0 + y * (1.0 - sigmoid))
    needs_x, needs_weight, needs_bias = needs
    return (
        stored_like(_input_gradient(grad_y, normalized, rstd, weight), x) if needs_x else None,
        _sum_per_channel(grad_y * normalized).to(weight.dtype) if needs_weight and weight is not None else None,
        _sum_per_channel(grad_y).to(bias.dtype) if needs_bias and bias is not None else None,
    )


def _input_gradient(grad_y: Tensor, normalized: Tensor, rstd: Tensor, weight: Tensor | None) -> Tensor:
    """rstd (g - mean(g) - normalized mean(g normalized)) with g = grad_y weight and means over the group."""
    num_groups = rstd.shape[1]
    g = _grouped(_affine(grad_y, weight, None), num_groups)
    n = _grouped(normalized, num_groups)
    g_mean = g.mean(dim=2, keepdim=True)
    gn_mean = (g * n).mean(dim=2, keepdim=True)
    return (rstd[:, :, None] * (g - g_mean - n * gn_mean)).reshape(grad_y.shape)


def _grouped(x: Tensor, num_groups: int) -> Tensor:
    """[B, C, ...] -> [B, num_groups, C / num_groups * ...] in the compute dtype."""
    return x.to(compute_dtype(x)).reshape(x.shape[0], num_groups, x.shape[1:].numel() // num_groups)


def _affine(values: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    channels = (-1, *[1] * (values.dim() - 2))
    if weight is not None:
        values = values * weight.to(values.dtype).reshape(channels)
    if bias is not None:
        values = values + bias.to(values.dtype).reshape(channels)
    return values


def _sum_per_channel(values: Tensor) -> Tensor:
    return values.sum(dim=[axis for axis in range(values.dim()) if axis != 1])
