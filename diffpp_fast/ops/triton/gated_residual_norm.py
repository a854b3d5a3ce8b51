"""A gated residual, the norm of the sum and its modulation: `modulated_norm` with all that it has."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from diffpp_fast.ops.triton import modulated_norm
from diffpp_fast.ops.triton.device import on_its_device

if TYPE_CHECKING:
    from diffpp_fast.ops.gated_residual_norm import Gradients, Needs

OP = "gated_residual_norm"


@on_its_device
def forward(
    residual: Tensor,
    branch: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
    layer: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    hidden, y, mean, rstd = modulated_norm.forward(OP, residual, branch, gate, weight, scale, shift, eps, layer)
    assert hidden is not None
    return hidden, y, mean, rstd


@on_its_device
def backward(
    grad_hidden: Tensor,
    grad_modulated: Tensor,
    hidden: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    branch: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    needs: Needs,
) -> Gradients:
    return modulated_norm.backward(
        OP, grad_hidden, grad_modulated, hidden, mean, rstd, branch, gate, weight, scale, shift, *needs
    )
