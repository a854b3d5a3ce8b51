"""The forward process x_t = alpha x0 + sigma eps, with eps drawn where it is used."""

from typing import Any

from torch import Tensor
from torch.autograd import Function

from diffpp_fast.kernels import dispatch
from diffpp_fast.kernels.reference import add_noise as definition
from diffpp_fast.kernels.reference.philox import Address
from diffpp_fast.noise import Noise
from diffpp_fast.ops import checks
from diffpp_fast.ops.autograd import by_definition, needs_gradient, recorded


def add_noise(x0: Tensor, alpha: Tensor, sigma: Tensor, noise: Noise | Tensor) -> Tensor:
    """x_t = alpha_b x0 + sigma_b eps.

    Args:
        x0: [B, ...], clean samples.
        alpha: [B], the factor of x0.
        sigma: [B], the factor of the noise.
        noise: a `Noise` of B samples, drawn in float32 inside the kernel and never stored; or eps itself, shaped
            as `x0`.

    Returns:
        x_t [B, ...] in the dtype and memory format of `x0`. An empty batch gives an empty result.

    Transforms:
        Kernels compute x_t and the gradient of `x0`. Plain torch computes gradients of `alpha`, `sigma` and a noise
        tensor, second derivatives, tangents (forward mode) and what `torch.func` makes of the operator, `vmap` among
        it; all are exact.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: shapes, batch sizes or devices differ; alpha or sigma is not finite (seen on the CPU only).
    """
    checks.floating("add_noise", {"x0": x0, "alpha": alpha, "sigma": sigma})
    if x0.dim() == 0:
        raise ValueError("add_noise: x0 must have shape [B, ...], got a scalar")
    checks.per_sample("add_noise", x0.shape[0], {"alpha": alpha, "sigma": sigma})
    eps = checks.noise("add_noise", noise, x0)
    dtype = checks.common_dtype(x0, eps)
    arguments = checks.cast(x0, dtype), alpha, sigma, checks.cast(eps, dtype)
    x_t: Tensor
    if by_definition(alpha, sigma, eps):
        x_t = definition.forward(*arguments)
    elif needs_gradient(x0):
        x_t = _AddNoise.apply(*arguments)
    else:
        x_t = dispatch.select("add_noise", x0.device, dtype).forward(*arguments)
    return checks.cast(x_t, x0.dtype)


class _AddNoise(Function):
    @staticmethod
    def forward(ctx: Any, x0: Tensor, alpha: Tensor, sigma: Tensor, noise: Address | Tensor) -> Tensor:
        ctx.kernels = dispatch.select("add_noise", x0.device, x0.dtype)
        ctx.save_for_backward(alpha)
        x_t: Tensor = ctx.kernels.forward(x0, alpha, sigma, noise)
        return x_t

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (alpha,) = ctx.saved_tensors
        kernels = definition if recorded() else ctx.kernels
        return kernels.backward(grad_output, alpha), None, None, None
