"""Group normalisation with its activation, forward and backward."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from diffpp_fast import transforms
from diffpp_fast.arguments import integer
from diffpp_fast.availability import fake
from diffpp_fast.backends import kernels, register
from diffpp_fast.ops import checks
from diffpp_fast.ops.autograd import needs_gradient, only_needed, recorded
from diffpp_fast.plain import compute_dtype, stored_like

ACTIVATIONS = ("silu", "identity")


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "silu",
) -> Tensor:
    """silu(y) or y, with y = (x - mean) / sqrt(variance + eps) * weight + bias over groups of channels.

    Equals `torch.nn.functional.group_norm` followed by `silu`. The variance is the biased one, in two passes.

    Args:
        x: [B, C, ...], any number of spatial dimensions.
        num_groups: divides C.
        weight: [C] or None for 1; its dtype may differ from that of `x`.
        bias: [C] or None for 0.
        eps: added to the variance.
        activation: "silu" or "identity".

    Returns:
        [B, C, ...] in the dtype and memory format of `x`. An empty batch gives an empty result.

    Transforms:
        Kernels compute the value and the gradients of `x`, `weight` and `bias`. Plain torch computes second
        derivatives, tangents (forward mode) and what `torch.func` makes of the operator, `vmap` among it; all are
        exact.

    Raises:
        TypeError: an argument is not a floating-point tensor, num_groups not an integer, or eps not a number.
        ValueError: wrong shapes, num_groups does not divide C, a sample has no elements, eps is negative or not
            finite, unknown activation.
    """
    op = "group_norm_silu"
    checks.floating(op, {"x": x, "weight": weight, "bias": bias}, optional=("weight", "bias"))
    if x.dim() < 2:
        raise ValueError(f"{op}: x must have shape [B, C, ...], got {list(x.shape)}")
    checks.elements(op, "x", x)
    channels = x.shape[1]
    num_groups = integer(op, "num_groups", num_groups)
    if num_groups < 1 or channels % num_groups:
        raise ValueError(f"{op}: num_groups must divide the {channels} channels, got {num_groups}")
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and parameter.shape != (channels,):
            raise ValueError(f"{op}: {name} must have shape [C] = [{channels}], got {list(parameter.shape)}")
    eps = checks.eps(op, eps)
    checks.one_of(op, "activation", activation, ACTIVATIONS)
    # A bool: torch 2.13's stable ABI leaks every string that an operator takes.
    silu = activation == "silu"
    y: Tensor
    if transforms.active():
        y, _, _ = forward(x, num_groups, weight, bias, eps, silu)
    elif needs_gradient(x, weight, bias):
        y = _GroupNormSilu.apply(x, weight, bias, (num_groups, eps, silu))
    else:
        y, _, _ = kernels(op, x.device, x.dtype, x.numel()).forward(x, num_groups, weight, bias, eps, silu)
    return y


def forward(
    x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, and each group's mean and 1 / sqrt(variance + eps): [B, num_groups] in the compute dtype."""
    groups = _grouped(x, num_groups)
    mean = groups.mean(dim=2)
    centered = groups - mean[:, :, None]
    # Two passes: E[x^2] - E[x]^2 loses the variance where the mean is large.
    rstd = torch.rsqrt(centered.square().mean(dim=2) + eps)
    normalized = (centered * rstd[:, :, None]).reshape(x.shape)
    y = _affine(normalized, weight, bias)
    return stored_like(y * torch.sigmoid(y) if silu else y, x), mean, rstd


def backward(
    grad_output: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    silu: bool,
    needs_x: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of x, weight and bias, each where it is needed."""
    num_groups = mean.shape[1]
    normalized = ((_grouped(x, num_groups) - mean[:, :, None]) * rstd[:, :, None]).reshape(x.shape)
    grad_y = grad_output.to(normalized.dtype)
    if silu:
        y = _affine(normalized, weight, bias)
        sigmoid = torch.sigmoid(y)
        grad_y = grad_y * sigmoid * (1.0 + y * (1.0 - sigmoid))
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


class _GroupNormSilu(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, numbers: tuple[int, float, bool]
    ) -> Tensor:
        num_groups, ctx.eps, ctx.silu = numbers
        ctx.kernels = kernels("group_norm_silu", x.device, x.dtype, x.numel())
        y: Tensor
        y, mean, rstd = ctx.kernels.forward(x, num_groups, weight, bias, ctx.eps, ctx.silu)
        ctx.save_for_backward(x, mean, rstd, weight, bias)
        return y

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd, weight, bias = ctx.saved_tensors
        differentiate = ctx.kernels.backward
        if recorded():
            differentiate = backward
            _, mean, rstd = forward(x, mean.shape[1], weight, bias, ctx.eps, ctx.silu)  # which depend on x
        needs = ctx.needs_input_grad[:3]
        grads = differentiate(grad_output, x, mean, rstd, weight, bias, ctx.silu, *needs)
        return (*only_needed(grads, needs), None)


def _fake(x: Tensor, num_groups: int, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    mean = x.new_empty((x.shape[0], num_groups), dtype=compute_dtype(x))
    return torch.empty_like(x), mean, torch.empty_like(mean)


def _fake_backward(
    grad_output: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    silu: bool,
    needs_x: bool,
    *needs: bool,
) -> tuple[Tensor, ...]:
    parameters = (
        x.new_empty(0) if value is None or not needed else value.new_empty(value.shape)
        for value, needed in zip((weight, bias), needs, strict=True)
    )
    return (torch.empty_like(x) if needs_x else x.new_empty(0), *parameters)


register("group_norm_silu", forward=forward, backward=backward)
fake("group_norm_silu", _fake)
fake("group_norm_silu_backward", _fake_backward)
