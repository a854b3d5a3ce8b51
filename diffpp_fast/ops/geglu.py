"""The gated linear unit of transformers' feed-forward layers, forward and backward."""

from typing import Any

import torch
from torch import Tensor

from diffpp_fast import transforms
from diffpp_fast.availability import fake
from diffpp_fast.backends import kernels, register
from diffpp_fast.ops import checks
from diffpp_fast.ops.autograd import Operator, needs_gradient, recorded, straight
from diffpp_fast.plain import compute_dtype, stored_like


def geglu(x: Tensor) -> Tensor:
    """a gelu(b), where a is the first half of the last dimension of x and b the second (Shazeer, arXiv 2002.05202).

    gelu(b) = b Phi(b) is the exact one, with Phi the standard normal distribution function. diffusers' `GEGLU` applies
    this to the output of its projection. Only x is kept for the backward pass.

    Args:
        x: [..., 2 D].

    Returns:
        [..., D] in the dtype of `x`, row-major. What is not finite spoils its own element.

    Transforms:
        Kernels compute the value and the gradient. Plain torch computes second derivatives, tangents (forward mode) and
        what `torch.func` makes of the operator, `vmap` among it; all are exact.

    Raises:
        TypeError: x is not a floating-point tensor.
        ValueError: the last dimension of x is odd or missing.
    """
    op = "geglu"
    checks.floating(op, {"x": x})
    if x.dim() == 0 or x.shape[-1] % 2:
        raise ValueError(f"{op}: x must have shape [..., 2 D], got {list(x.shape)}")
    y: Tensor
    if transforms.active():
        y = forward(x)
    elif needs_gradient(x):
        y = _Geglu.directly(x)
    else:
        y = kernels(op, x.device, x.dtype).forward(x)
    return y


def forward(x: Tensor) -> Tensor:
    """Return a gelu(b), by the formula."""
    a, b = x.to(compute_dtype(x)).chunk(2, dim=-1)
    return (a * torch.nn.functional.gelu(b)).to(x.dtype).contiguous()


def backward(grad_output: Tensor, x: Tensor) -> Tensor:
    """Return the gradient of x."""
    a, b = x.to(compute_dtype(x)).chunk(2, dim=-1)
    grad = grad_output.to(a.dtype)
    below = 0.5 * torch.special.erfc(b * -(0.5**0.5))
    density = torch.exp(-0.5 * b.square()) / (2.0 * torch.pi) ** 0.5
    return stored_like(torch.cat((grad * (b * below), grad * a * (below + b * density)), dim=-1), x)


@straight
class _Geglu(Operator):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.kernels = kernels("geglu", x.device, x.dtype)
        ctx.save_for_backward(x)
        y: Tensor = ctx.kernels.forward(x)
        return y

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:
        differentiate = backward if recorded(grad_output) else ctx.kernels.backward
        grad: Tensor = differentiate(grad_output, *ctx.saved_tensors)
        return grad


register("geglu", cuda=False, forward=forward, backward=backward)
fake("geglu", lambda x: x.new_empty((*x.shape[:-1], x.shape[-1] // 2)))
fake("geglu_backward", lambda grad_output, x: torch.empty_like(x))
