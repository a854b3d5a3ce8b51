"""x_t = alpha x0 + sigma eps, with eps drawn where it is used."""

import torch
from torch import Tensor
from torch.library import register_fake

from diffpp_fast.kernels.native import noise_arguments
from diffpp_fast.kernels.reference.philox import Address

_ops = torch.ops.diffpp_fast


def forward(x0: Tensor, alpha: Tensor, sigma: Tensor, noise: Tensor | Address) -> Tensor:
    x_t: Tensor = _ops.add_noise.default(x0, alpha, sigma, *noise_arguments(noise))
    return x_t


def backward(grad_output: Tensor, alpha: Tensor) -> Tensor:
    grad_x0: Tensor = _ops.add_noise_backward.default(grad_output, alpha)
    return grad_x0


@register_fake("diffpp_fast::add_noise")
def _(x0: Tensor, alpha: Tensor, sigma: Tensor, noise: Tensor, seed: int, stream: int) -> Tensor:
    return torch.empty_like(x0)


@register_fake("diffpp_fast::add_noise_backward")
def _(grad_output: Tensor, alpha: Tensor) -> Tensor:
    return torch.empty_like(grad_output)
