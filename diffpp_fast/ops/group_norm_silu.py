"""Group normalisation with its activation, forward and backward."""

from typing import Any, overload

import torch
from torch import Tensor

from diffpp_fast import transforms
from diffpp_fast.arguments import integer
from diffpp_fast.availability import fake
from diffpp_fast.backends import kernels, register
from diffpp_fast.ops import checks
from diffpp_fast.ops.autograd import Operator, needs_gradient, only_needed, recorded, straight
from diffpp_fast.plain import compute_dtype, stored_like

ACTIVATIONS = ("silu", "identity")


@overload
def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "silu",
    *,
    residual: None = None,
    offset: Tensor | None = None,
) -> Tensor: ...


@overload
def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "silu",
    *,
    residual: Tensor,
    offset: None = None,
) -> tuple[Tensor, Tensor]: ...


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "silu",
    *,
    residual: Tensor | None = None,
    offset: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """silu(y) or y, with y = (x - mean) / sqrt(variance + eps) * weight + bias over groups of channels.

    Equals `torch.nn.functional.group_norm` followed by `silu`. The variance is the biased one, in two passes.

    Args:
        x: [B, C, ...], any number of spatial dimensions.
        num_groups: divides C. A group of one element is allowed, which torch's own refuses.
        weight: [C] or None for 1; its dtype may differ from that of `x`.
        bias: [C] or None for 0.
        eps: added to the variance.
        activation: "silu" or "identity".
        residual: added to x before the norm, in the shape and dtype of `x`, to which the sum is rounded.
        offset: [B, C], added to the channels of x before the norm and not rounded, as a time embedding is; its dtype
            may differ from that of `x`. Not beside a residual.

    Returns:
        [B, C, ...] in the dtype and memory format of `x`, under autocast too; with a residual a pair of it and x +
        residual. An empty batch gives an empty result. What is not finite spoils its group of its sample, and the
        gradients of weight and bias.

    Transforms:
        Kernels compute the value and the gradients of every tensor, each in the dtype of its own. Kept for them are `x`
        or the sum, mean and deviation of each group, and the parameters. Plain torch computes second derivatives,
        tangents (forward mode) and what `torch.func` makes of the operator, `vmap` among it; all are exact.

    Raises:
        TypeError: an argument is not a floating-point tensor, num_groups not an integer, or eps not a number.
        ValueError: wrong shapes or dtypes, num_groups does not divide C, a sample has no elements, eps is negative or
            not finite, unknown activation, both residual and offset.
    """
    op = "group_norm_silu"
    tensors = {"x": x, "weight": weight, "bias": bias, "residual": residual, "offset": offset}
    checks.floating(op, tensors, optional=("weight", "bias", "residual", "offset"))
    if x.dim() < 2:
        raise ValueError(f"{op}: x must have shape [B, C, ...], got {list(x.shape)}")
    checks.elements(op, "x", x)
    channels = x.shape[1]
    num_groups = integer(op, "num_groups", num_groups)
    if num_groups < 1 or channels % num_groups:
        raise ValueError(f"{op}: num_groups must divide the {channels} channels, got {num_groups}")
    per_channel = (channels,)
    if (weight is not None and weight.shape != per_channel) or (bias is not None and bias.shape != per_channel):
        _refuse_parameters(op, channels, weight=weight, bias=bias)
    if residual is not None:
        if offset is not None:
            raise ValueError(f"{op}: takes a residual or an offset, not both")
        if residual.shape != x.shape or residual.dtype != x.dtype:
            expected, got = (f"{list(tensor.shape)} {tensor.dtype}" for tensor in (x, residual))
            raise ValueError(f"{op}: residual must be as x, {expected}, got {got}")
    if offset is not None and offset.shape != x.shape[:2]:
        raise ValueError(f"{op}: offset must have shape [B, C] = {list(x.shape[:2])}, got {list(offset.shape)}")
    eps = checks.eps(op, eps)
    checks.one_of(op, "activation", activation, ACTIVATIONS)
    # A bool: torch 2.13's stable ABI leaks every string that an operator takes.
    silu = activation == "silu"
    if residual is not None:
        return _of_sum(x, residual, num_groups, weight, bias, eps, silu)
    y: Tensor
    if transforms.active():
        y, _, _ = forward(x, num_groups, weight, bias, eps, silu, offset)
    elif needs_gradient(x, weight, bias, offset):
        y = _GroupNormSilu.directly(x, weight, bias, offset, (num_groups, eps, silu))
    else:
        serving = kernels(op, x.device, x.dtype, x.numel())
        y, _, _ = serving.forward(x, num_groups, weight, bias, eps, silu, offset)
    return y


def _refuse_parameters(op: str, channels: int, **parameters: Tensor | None) -> None:
    for name, parameter in parameters.items():
        if parameter is not None and parameter.shape != (channels,):
            raise ValueError(f"{op}: {name} must have shape [C] = [{channels}], got {list(parameter.shape)}")


def _of_sum(
    x: Tensor, residual: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, silu: bool
) -> tuple[Tensor, Tensor]:
    y: Tensor
    total: Tensor
    if transforms.active():
        y, total, _, _ = forward_of_sum(x, residual, num_groups, weight, bias, eps, silu)
    elif needs_gradient(x, residual, weight, bias):
        y, total = _GroupNormSiluOfSum.directly(x, residual, weight, bias, (num_groups, eps, silu))
    else:
        serving = kernels("group_norm_silu", x.device, x.dtype, x.numel())
        y, total, _, _ = serving.group_norm_silu_of_sum(x, residual, num_groups, weight, bias, eps, silu)
    return y, total


def forward(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    silu: bool,
    offset: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, and each group's mean and 1 / sqrt(variance + eps): [B, num_groups] in the compute dtype."""
    groups = _grouped(x, num_groups, offset)
    mean = groups.mean(dim=2)
    centered = groups - mean[:, :, None]
    # Two passes: E[x^2] - E[x]^2 loses the variance where the mean is large.
    rstd = torch.rsqrt(centered.square().mean(dim=2) + eps)
    normalized = (centered * rstd[:, :, None]).reshape(x.shape)
    y = _affine(normalized, weight, bias)
    return stored_like(y * torch.sigmoid(y) if silu else y, x), mean, rstd


def forward_of_sum(
    x: Tensor, residual: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return y of x + residual, that sum, and each group's mean and 1 / sqrt(variance + eps)."""
    total = stored_like(x + residual, x)
    y, mean, rstd = forward(total, num_groups, weight, bias, eps, silu, None)
    return y, total, mean, rstd


def backward(
    grad_output: Tensor,
    grad_sum: Tensor | None,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    offset: Tensor | None,
    silu: bool,
    needs_x: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of x, to which `grad_sum` is added, weight and bias, each where it is needed."""
    num_groups = mean.shape[1]
    normalized = ((_grouped(x, num_groups, offset) - mean[:, :, None]) * rstd[:, :, None]).reshape(x.shape)
    grad_y = grad_output.to(normalized.dtype)
    if silu:
        y = _affine(normalized, weight, bias)
        sigmoid = torch.sigmoid(y)
        grad_y = grad_y * sigmoid * (1.0 + y * (1.0 - sigmoid))
    grad_x = None
    if needs_x:
        grad_x = _input_gradient(grad_y, normalized, rstd, weight)
        grad_x = stored_like(grad_x if grad_sum is None else grad_x + grad_sum, x)
    return (
        grad_x,
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


def _grouped(x: Tensor, num_groups: int, offset: Tensor | None = None) -> Tensor:
    """[B, C, ...], plus the offset of each channel -> [B, num_groups, C / num_groups * ...] in the compute dtype."""
    wide = x.to(compute_dtype(x))
    if offset is not None:
        wide = wide + offset.to(wide.dtype).reshape(*offset.shape, *[1] * (x.dim() - 2))
    return wide.reshape(x.shape[0], num_groups, x.shape[1:].numel() // num_groups)


def _affine(values: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    channels = (-1, *[1] * (values.dim() - 2))
    if weight is not None:
        values = values * weight.to(values.dtype).reshape(channels)
    if bias is not None:
        values = values + bias.to(values.dtype).reshape(channels)
    return values


def _sum_per_channel(values: Tensor) -> Tensor:
    return values.sum(dim=[axis for axis in range(values.dim()) if axis != 1])


@straight
class _GroupNormSilu(Operator):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        offset: Tensor | None,
        numbers: tuple[int, float, bool],
    ) -> Tensor:
        ctx.numbers = num_groups, eps, silu = numbers
        ctx.kernels = serving = kernels("group_norm_silu", x.device, x.dtype, x.numel())
        y: Tensor
        y, mean, rstd = serving.forward(x, num_groups, weight, bias, eps, silu, offset)
        ctx.save_for_backward(x, mean, rstd, weight, bias, offset)
        ctx.offset_dtype = None if offset is None else offset.dtype
        return y

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        needs_x, needs_weight, needs_bias, needs_offset, _ = ctx.needs_input_grad
        needs = needs_x or needs_offset, needs_weight, needs_bias
        grad_x, grad_weight, grad_bias = _gradients(ctx, grad_output, None, needs)
        grad_offset = None
        if needs_offset:
            assert grad_x is not None
            # Every pixel of a channel has it.
            grad_offset = grad_x.sum(dim=list(range(2, grad_x.dim()))) if grad_x.dim() > 2 else grad_x
            # What is saved can be read once alone under torch.utils.checkpoint.
            grad_offset = grad_offset.to(ctx.offset_dtype)
        return grad_x if needs_x else None, grad_weight, grad_bias, grad_offset, None


@straight
class _GroupNormSiluOfSum(Operator):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        numbers: tuple[int, float, bool],
    ) -> tuple[Tensor, Tensor]:
        ctx.numbers = num_groups, eps, silu = numbers
        ctx.kernels = serving = kernels("group_norm_silu", x.device, x.dtype, x.numel())
        ctx.set_materialize_grads(False)
        y: Tensor
        total: Tensor
        y, total, mean, rstd = serving.group_norm_silu_of_sum(x, residual, num_groups, weight, bias, eps, silu)
        ctx.save_for_backward(total, mean, rstd, weight, bias, None)
        return y, total

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, grad_sum: Tensor | None) -> tuple[Tensor | None, ...]:
        needs_x, needs_residual, needs_weight, needs_bias, _ = ctx.needs_input_grad
        needs = needs_x or needs_residual, needs_weight, needs_bias
        grads = (grad_sum, None, None) if grad_output is None else _gradients(ctx, grad_output, grad_sum, needs)
        grad_x, grad_weight, grad_bias = grads
        # One tensor for both.
        return grad_x if needs_x else None, grad_x if needs_residual else None, grad_weight, grad_bias, None


def _gradients(
    ctx: Any, grad_output: Tensor, grad_sum: Tensor | None, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, ...]:
    """Return those of x, weight and bias, each where it is needed."""
    x, mean, rstd, weight, bias, offset = ctx.saved_tensors
    num_groups, eps, silu = ctx.numbers
    differentiate = ctx.kernels.backward
    if recorded(grad_output, grad_sum):
        differentiate = backward
        _, mean, rstd = forward(x, num_groups, weight, bias, eps, silu, offset)  # which depend on x
    grads = differentiate(grad_output, grad_sum, x, mean, rstd, weight, bias, offset, silu, *needs)
    return only_needed(grads, needs)


def _fake(x: Tensor, num_groups: int, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    mean = x.new_empty((x.shape[0], num_groups), dtype=compute_dtype(x))
    return torch.empty_like(x), mean, torch.empty_like(mean)


def _fake_of_sum(x: Tensor, residual: Tensor, num_groups: int, *others: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y, mean, rstd = _fake(x, num_groups)
    return y, torch.empty_like(x), mean, rstd


def _fake_backward(
    grad_output: Tensor,
    grad_sum: Tensor | None,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    offset: Tensor | None,
    silu: bool,
    needs_x: bool,
    *needs: bool,
) -> tuple[Tensor, ...]:
    parameters = (
        x.new_empty(0) if value is None or not needed else value.new_empty(value.shape)
        for value, needed in zip((weight, bias), needs, strict=True)
    )
    return (torch.empty_like(x) if needs_x else x.new_empty(0), *parameters)


register("group_norm_silu", forward=forward, backward=backward, group_norm_silu_of_sum=forward_of_sum)
fake("group_norm_silu", _fake)
fake("group_norm_silu_of_sum", _fake_of_sum)
fake("group_norm_silu_backward", _fake_backward)
