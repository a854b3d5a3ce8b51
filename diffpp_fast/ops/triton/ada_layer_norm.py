"""Layer normalisation without parameters, scaled and shifted per sample: `modulated_norm` without a residual."""

from torch import Tensor

from diffpp_fast.ops.triton import modulated_norm
from diffpp_fast.ops.triton.device import on_its_device


@on_its_device
def forward(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    _, y, mean, rstd = modulated_norm.forward("ada_layer_norm", x, None, None, None, scale, shift, eps=eps, layer=True)
    assert mean is not None
    return y, mean, rstd


@on_its_device
def backward(
    grad_output: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    scale: Tensor,
    needs_x: bool,
    needs_scale: bool,
    needs_shift: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    grad_x, _, _, _, grad_scale, grad_shift = modulated_norm.backward(
        "ada_layer_norm",
        None,
        grad_output,
        x,
        mean,
        rstd,
        None,
        None,
        None,
        scale,
        scale,
        needs_x=needs_x,
        needs_branch=False,
        needs_gate=False,
        needs_weight=False,
        needs_scale=needs_scale,
        needs_shift=needs_shift,
    )
    return grad_x, grad_scale, grad_shift
