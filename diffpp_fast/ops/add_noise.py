"""The forward process x_t = alpha x0 + sigma eps, with eps drawn where it is used."""

from typing import Any

import torch
from torch import Tensor

from diffpp_fast.availability import fake
from diffpp_fast.backends import kernels, register
from diffpp_fast.noise import Noise
from diffpp_fast.ops import checks
from diffpp_fast.ops.autograd import Operator, by_definition, needs_gradient, recorded, straight
from diffpp_fast.philox import normal_like
from diffpp_fast.plain import compute_dtype, per_sample, stored_like


def add_noise(x0: Tensor, alpha: Tensor, sigma: Tensor, noise: Noise | Tensor) -> Tensor:
    """x_t = alpha_b x0 + sigma_b eps.

    Args:
        x0: [B, ...], clean samples.
        alpha: [B], the factor of x0.
        sigma: [B], the factor of the noise.
        noise: a `Noise` of B samples, drawn in float32 inside the kernel and never stored; or eps itself, shaped
            as `x0`.

    Returns:
        x_t [B, ...] in the dtype and memory format of `x0`, also where a noise tensor has a wider one. An empty batch
        gives an empty result. A `Noise` and the tensor of its normals give the same bits. An element is a product and a
        fused multiply-add, rounded once more to a low precision; "reference", and processors without such an
        instruction, round the second product as well.

    Transforms:
        Kernels compute x_t and the gradient of `x0`, for which `alpha` is kept. Plain torch computes gradients of
        `alpha`, `sigma` and a noise tensor, second derivatives, tangents (forward mode) and what `torch.func` makes of
        the operator, `vmap` among it; all are exact.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: shapes, batch sizes or devices differ; alpha or sigma is not finite (seen on the CPU only).
    """
    op = "add_noise"
    checks.floating(op, {"x0": x0, "alpha": alpha, "sigma": sigma})
    if x0.dim() == 0:
        raise ValueError(f"{op}: x0 must have shape [B, ...], got a scalar")
    checks.per_sample(op, x0.shape[0], {"alpha": alpha, "sigma": sigma})
    eps, seed, stream = checks.address(op, noise, x0)
    dtype = x0.dtype
    x0, eps = checks.promoted(x0, eps)
    x_t: Tensor
    if by_definition(alpha, sigma, eps):
        x_t = forward(x0, alpha, sigma, eps, seed, stream)
    elif needs_gradient(x0):
        x_t = _AddNoise.directly(x0, (alpha, sigma, eps, seed, stream))
    else:
        x_t = kernels(op, x0.device, x0.dtype, x0.numel()).forward(x0, alpha, sigma, eps, seed, stream)
    return checks.cast(x_t, dtype)


def forward(x0: Tensor, alpha: Tensor, sigma: Tensor, noise: Tensor, seed: int, stream: int) -> Tensor:
    """Return x_t, by the formula. noise, seed and stream are as in `diffpp_fast.philox`."""
    dtype = compute_dtype(x0)
    eps = normal_like(noise, seed, stream, x0, dtype)
    return stored_like(per_sample(alpha, x0) * x0.to(dtype) + per_sample(sigma, x0) * eps, x0)


def backward(grad_output: Tensor, alpha: Tensor) -> Tensor:
    """Return the gradient of x0."""
    scaled = per_sample(alpha, grad_output) * grad_output.to(compute_dtype(grad_output))
    return stored_like(scaled, grad_output)


@straight
class _AddNoise(Operator):
    @staticmethod
    def forward(ctx: Any, x0: Tensor, others: tuple[Any, ...]) -> Tensor:
        ctx.kernels = kernels("add_noise", x0.device, x0.dtype, x0.numel())
        ctx.save_for_backward(others[0])
        x_t: Tensor = ctx.kernels.forward(x0, *others)
        return x_t

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (alpha,) = ctx.saved_tensors
        differentiate = backward if recorded(grad_output) else ctx.kernels.backward
        return differentiate(grad_output, alpha), None


register("add_noise", forward=forward, backward=backward)
fake("add_noise", lambda x0, *others: torch.empty_like(x0))
fake("add_noise_backward", lambda grad_output, alpha: torch.empty_like(grad_output))
