"""The forward process x_t = alpha x0 + sigma eps, with eps drawn where it is used."""

from typing import Any

from torch import Tensor
from torch.autograd import Function

from diffpp_fast.kernels import dispatch
from diffpp_fast.kernels.reference.philox import Address
from diffpp_fast.noise import Noise
from diffpp_fast.ops import checks
from diffpp_fast.ops.autograd import once_differentiable


def add_noise(x0: Tensor, alpha: Tensor, sigma: Tensor, noise: Noise | Tensor) -> Tensor:
    """x_t = alpha_b x0 + sigma_b eps.

    Args:
        x0: [B, ...], clean samples.
        alpha: [B], the factor of x0.
        sigma: [B], the factor of the noise.
        noise: a `Noise` of B samples, drawn in float32 inside the kernel and never stored; or eps itself, shaped
            as `x0`.

    Returns:
        x_t [B, ...] in the dtype and memory format of `x0`. Differentiable in `x0`; `alpha`, `sigma` and `noise` get
        no gradient. An empty batch gives an empty result.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: shapes, batch sizes or devices differ; alpha or sigma is not finite (seen on the CPU only).
    """
    checks.floating("add_noise", {"x0": x0, "alpha": alpha, "sigma": sigma})
    checks.same_shape("add_noise", {"x0": x0})
    checks.per_sample("add_noise", x0.shape[0], {"alpha": alpha, "sigma": sigma})
    eps = checks.noise("add_noise", noise, x0)
    dtype = checks.common_dtype(x0, eps)
    arguments = checks.cast(x0, dtype), alpha, sigma, checks.cast(eps, dtype)
    if checks.needs_gradient(x0):
        x_t: Tensor = _AddNoise.apply(*arguments)
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
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (alpha,) = ctx.saved_tensors
        grad_x0 = ctx.kernels.backward(grad_output, alpha) if ctx.needs_input_grad[0] else None
        return grad_x0, None, None, None
