"""x_t = alpha x0 + sigma eps."""

from torch import Tensor

from diffpp_fast.kernels.reference import compute_dtype, per_sample, stored_like
from diffpp_fast.kernels.reference.philox import Address, normal_like


def forward(x0: Tensor, alpha: Tensor, sigma: Tensor, noise: Tensor | Address) -> Tensor:
    dtype = compute_dtype(x0)
    eps = normal_like(noise, x0, dtype)
    return stored_like(per_sample(alpha, x0) * x0.to(dtype) + per_sample(sigma, x0) * eps, x0)


def backward(grad_output: Tensor, alpha: Tensor) -> Tensor:
    scaled = per_sample(alpha, grad_output) * grad_output.to(compute_dtype(grad_output))
    return stored_like(scaled, grad_output)
