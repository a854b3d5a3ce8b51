"""Layers with frozen weights: linear maps that keep the weight alone, and the nonlinear ones with what they need.

Torch's convolution keeps its input, which only the weight's gradient needs. Here the backward pass is the adjoint
map, which is a convolution of the transposed kind and takes nothing but the weight. Weights are read, and cast to the
dtype of the data, at every use: what was loaded, moved or cast in the meantime counts. None ever gets a gradient.

Second derivatives differentiate the adjoint maps. Inside transforms of `torch.func` and forward-mode AD the layers are
torch's own, and a derivative by a weight raises.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from diffpp_fast import ops, transforms
from diffpp_fast.ops.autograd import refused
from diffpp_fast.plain import compute_dtype

FROZEN = "FrozenDecoder: a derivative by its weights is asked for; they are frozen, and have none"
#: The least norm of a pixel's channels that a channel norm divides by, as torch's `normalize` has it.
NORM_FLOOR = 1e-12


def convolution(x: Tensor, layer: nn.Conv2d, *, residual: Tensor | None = None, relu: bool = False) -> Tensor:
    """layer(x) [B, C', H', W'], plus `residual` of that shape, then ReLU; each of the two if asked for.

    Keeps nothing, or one byte per output of the ReLU.
    """
    geometry: Any = (layer.stride, layer.padding, layer.dilation, layer.groups)
    if transforms.active():
        weight, bias = _frozen(layer, x)
        y = F.conv2d(x, weight, bias, *geometry)
        y = y if residual is None else y + residual
        return y.relu() if relu else y
    y = _Convolution.apply(x, layer.weight, layer.bias, residual, relu, geometry)
    return y


def enlarged_convolution(x: Tensor, layer: nn.Conv2d, taps: Tensor) -> Tensor:
    """layer(x enlarged twofold by nearest neighbours): x [B, C, H, W] -> [B, C', 2H, 2W]. Keeps nothing.

    Each output sees only 2 x 2 different pixels of x. Summing the weights that meet at a pixel gives a transposed
    convolution, 4 x 4 with stride 2, which is equal but for the rounding of the sums, takes 16 of 36 multiplications
    and makes no enlarged copy.

    Args:
        layer: 3 x 3 with padding 1.
        taps: from `enlarging_taps`.
    """
    if transforms.active():
        weight, bias = _frozen(layer, x)
        return F.conv_transpose2d(x, summed(weight, taps, x.dtype), bias, stride=2, padding=1)
    y: Tensor = _EnlargedConvolution.apply(x, layer.weight, layer.bias, taps)
    return y


def enlarging_taps(like: Tensor) -> Tensor:
    """[9, 16] of zeros and ones: which of 3 x 3 weights add up to each of 4 x 4. Made on the device, without a copy."""
    row = torch.ones(3, 4, dtype=like.dtype, device=like.device).triu().tril(1).flip(0)
    return (row[:, None, :, None] * row[None, :, None, :]).reshape(9, 16)


def linear(x: Tensor, layer: nn.Linear) -> Tensor:
    """layer(x), [..., C] -> [..., C']. Keeps nothing."""
    if transforms.active():
        return F.linear(x, *_frozen(layer, x))
    y: Tensor = _Linear.apply(x, layer.weight, layer.bias)
    return y


def group_norm(x: Tensor, layer: nn.GroupNorm, activation: str = "silu") -> Tensor:
    """activation(layer(x)). Keeps x and two statistics per group."""
    weight, bias = _parameters(layer)
    return ops.group_norm_silu(x, layer.num_groups, weight, bias, layer.eps, activation)


def group_norm_of_sum(x: Tensor, residual: Tensor, layer: nn.GroupNorm) -> tuple[Tensor, Tensor]:
    """silu(layer(x + residual)), and the sum. Keeps the sum and two statistics per group."""
    weight, bias = _parameters(layer)
    return ops.group_norm_silu(x, layer.num_groups, weight, bias, layer.eps, residual=residual)


def channel_norm(x: Tensor, weight: Tensor, activation: str = "silu") -> Tensor:
    """activation(x / rms(x) weight), where the root of the mean square is that over the channels. Keeps x."""
    if transforms.active():
        (weight,) = refused(FROZEN, [weight])
        return _channel_norm(x, weight.flatten(), activation == "silu")
    y: Tensor = _ChannelNorm.apply(x, weight.detach().flatten(), activation == "silu")
    return y


def layout(x: Tensor) -> torch.memory_format:
    """The memory format of x [B, C, H, W]."""
    return torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format


class _Convolution(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        relu: bool,
        geometry: tuple[Any, Any, Any, int],
    ) -> Tensor:
        y = F.conv2d(x, weight.to(x.dtype), _cast(bias, x), *geometry)
        if residual is not None:
            y += residual
        blocked = None
        if relu:
            y = y.relu_()
            blocked = y <= 0
        ctx.save_for_backward(weight, blocked)
        ctx.geometry, ctx.layout, ctx.size = geometry, layout(x), x.shape[2:]
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, blocked = ctx.saved_tensors
        needs_x, _, _, needs_residual, _, _ = ctx.needs_input_grad
        stride, padding, dilation, groups = ctx.geometry
        if blocked is not None:
            grad = grad.masked_fill(blocked, 0.0)
        grad = laid_out(grad, ctx.layout)
        grad_x = None
        if needs_x:
            # Rows and columns at the end of x that no step of the stride reaches.
            rest = [
                (size + 2 * pad - step * (taps - 1) - 1) % by
                for size, taps, by, pad, step in zip(ctx.size, weight.shape[2:], stride, padding, dilation, strict=True)
            ]
            grad_x = F.conv_transpose2d(grad, weight.to(grad.dtype), None, stride, padding, rest, groups, dilation)
        return grad_x, None, None, grad if needs_residual else None, None, None


class _EnlargedConvolution(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, taps: Tensor) -> Tensor:
        ctx.save_for_backward(weight, taps)
        ctx.layout = layout(x)
        return F.conv_transpose2d(x, summed(weight, taps, x.dtype), _cast(bias, x), stride=2, padding=1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, taps = ctx.saved_tensors
        grad = laid_out(grad, ctx.layout)
        return F.conv2d(grad, summed(weight, taps, grad.dtype), stride=2, padding=1), None, None, None


class _Linear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return F.linear(x, weight.to(x.dtype), _cast(bias, x))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        return F.linear(grad, weight.to(grad.dtype).t()), None, None


class _ChannelNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, silu: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.silu = silu
        return _channel_norm(x, weight, silu)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        unit, rrms, weight = _unit(x, weight)
        g = grad.to(unit.dtype)
        if ctx.silu:
            y = unit * weight
            sigmoid = y.sigmoid()
            g = g * sigmoid * (1.0 + y * (1.0 - sigmoid))
        g = g * weight
        # The part along x changes no direction.
        return ((g - unit * (unit * g).mean(1, keepdim=True)) * rrms).to(x.dtype), None, None


def _channel_norm(x: Tensor, weight: Tensor, silu: bool) -> Tensor:
    unit, _, weight = _unit(x, weight)
    y = unit * weight
    return (F.silu(y) if silu else y).to(x.dtype)


def _unit(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x over the root of its mean square, one over that root, and the weight, all as wide as is computed."""
    wide = compute_dtype(x)
    x = x.to(wide)
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min(NORM_FLOOR)
    rrms = x.shape[1] ** 0.5 / norm
    return x * rrms, rrms, weight.to(wide)[None, :, None, None]


def _parameters(layer: nn.GroupNorm) -> tuple[Tensor | None, Tensor | None]:
    """Weight and bias of a norm, which get no gradient."""
    if transforms.active():
        return _frozen(layer)
    weight, bias = (None if value is None else value.detach() for value in (layer.weight, layer.bias))
    return weight, bias


def _frozen(layer: Any, like: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Weight and bias inside a transform, in the dtype of `like`: a derivative by them raises."""
    weight, bias = refused(
        FROZEN,
        [layer.weight, layer.bias],
    )
    return (weight, bias) if like is None else (weight.to(like.dtype), _cast(bias, like))


def laid_out(grad: Tensor, memory_format: torch.memory_format) -> Tensor:
    """A gradient in the layout of the forward pass; as it is under `is_grads_batched`, where torch hides the layout."""
    batched = not torch.compiler.is_compiling() and torch._C._functorch.is_legacy_batchedtensor(grad)
    return grad if batched else grad.contiguous(memory_format=memory_format)


def summed(weight: Tensor, taps: Tensor, dtype: torch.dtype) -> Tensor:
    """[C', C, 3, 3] -> [C, C', 4, 4], each sum rounded once."""
    sums = weight.flatten(2) @ taps.to(weight.dtype)
    return sums.unflatten(2, (4, 4)).transpose(0, 1).to(dtype)


def _cast(bias: Tensor | None, like: Tensor) -> Tensor | None:
    return None if bias is None else bias.to(like.dtype)
