"""The gated linear unit of transformers' feed-forward layers, forward and backward."""

from typing import Any

from torch import Tensor
from torch.autograd import Function

from diffpp_fast import transforms
from diffpp_fast.kernels import dispatch
from diffpp_fast.kernels.reference import geglu as definition
from diffpp_fast.ops import checks
from diffpp_fast.ops.autograd import needs_gradient, recorded


def geglu(x: Tensor) -> Tensor:
    """a gelu(b), where a is the first half of the last dimension of x and b the second (Shazeer, arXiv 2002.05202).

    gelu(b) = b Phi(b) is the exact one, with Phi the standard normal distribution function. diffusers' `GEGLU` applies
    this to the output of its projection. Only x is kept for the backward pass.

    Args:
        x: [..., 2 D].

    Returns:
        [..., D] in the dtype of `x`, row-major.

    Transforms:
        Kernels compute the value and the gradient. Plain torch computes second derivatives, tangents (forward mode)
        and what `torch.func` makes of the operator, `vmap` among it; all are exact.

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
        y = definition.forward(x)
    elif needs_gradient(x):
        y = _Geglu.apply(x)
    else:
        y = dispatch.select(op, x.device, x.dtype).forward(x)
    return y


class _Geglu(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.kernels = dispatch.select("geglu", x.device, x.dtype)
        ctx.save_for_backward(x)
        y: Tensor = ctx.kernels.forward(x)
        return y

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:
        kernels = definition if recorded() else ctx.kernels
        grad: Tensor = kernels.backward(grad_output, *ctx.saved_tensors)
        return grad
