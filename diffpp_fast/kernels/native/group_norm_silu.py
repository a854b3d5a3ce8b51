"""Group normalisation followed by SiLU or nothing, each in one operator."""

import torch
from torch import Tensor
from torch.library import register_fake

from diffpp_fast.kernels.reference import compute_dtype

_ops = torch.ops.diffpp_fast


def forward(
    x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    # A bool: torch 2.13's stable ABI leaks every string that an operator takes.
    result: tuple[Tensor, Tensor, Tensor] = _ops.group_norm_silu.default(
        x, num_groups, weight, bias, eps, activation == "silu"
    )
    return result


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
    needs_x, needs_weight, needs_bias = needs
    needs_weight = needs_weight and weight is not None
    needs_bias = needs_bias and bias is not None
    grad_x, grad_weight, grad_bias = _ops.group_norm_silu_backward.default(
        grad_output, x, mean, rstd, weight, bias, activation == "silu", needs_x, needs_weight, needs_bias
    )
    return grad_x if needs_x else None, grad_weight if needs_weight else None, grad_bias if needs_bias else None


@register_fake("diffpp_fast::group_norm_silu")
def _(
    x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    mean = x.new_empty((x.shape[0], num_groups), dtype=compute_dtype(x))
    return torch.empty_like(x), mean, torch.empty_like(mean)


@register_fake("diffpp_fast::group_norm_silu_backward")
def _(
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
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(x) if needs_x else x.new_empty(0),
        weight.new_empty(weight.shape) if needs_weight and weight is not None else x.new_empty(0),
        bias.new_empty(bias.shape) if needs_bias and bias is not None else x.new_empty(0),
    )
