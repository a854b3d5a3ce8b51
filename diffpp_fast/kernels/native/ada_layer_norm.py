"""Layer normalisation without parameters, scaled and shifted per sample, each direction in one operator."""

import torch
from torch import Tensor
from torch.library import register_fake

from diffpp_fast.kernels.reference import compute_dtype

_ops = torch.ops.diffpp_fast


def forward(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    result: tuple[Tensor, Tensor, Tensor] = _ops.ada_layer_norm.default(x, scale, shift, eps)
    return result


def backward(
    grad_output: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, scale: Tensor, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    grads = _ops.ada_layer_norm_backward.default(grad_output, x, mean, rstd, scale, *needs)
    grad_x, grad_scale, grad_shift = (grad if needed else None for grad, needed in zip(grads, needs, strict=True))
    return grad_x, grad_scale, grad_shift


@register_fake("diffpp_fast::ada_layer_norm")
def _(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    mean = x.new_empty((x.shape[0], x.shape[1:-1].numel()), dtype=compute_dtype(x))
    return torch.empty_like(x), mean, torch.empty_like(mean)


@register_fake("diffpp_fast::ada_layer_norm_backward")
def _(
    grad_output: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    scale: Tensor,
    needs_x: bool,
    needs_scale: bool,
    needs_shift: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(x) if needs_x else x.new_empty(0),
        scale.new_empty(scale.shape if needs_scale else (0,)),
        scale.new_empty(scale.shape if needs_shift else (0,)),
    )
