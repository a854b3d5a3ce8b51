"""a gelu(b) of the halves of the last dimension, with the exact gelu."""

import torch
from torch import Tensor

from diffpp_fast.kernels.reference import compute_dtype, stored_like


def forward(x: Tensor) -> Tensor:
    a, b = x.to(compute_dtype(x)).chunk(2, dim=-1)
    return (a * torch.nn.functional.gelu(b)).to(x.dtype).contiguous()


def backward(grad_output: Tensor, x: Tensor) -> Tensor:
    a, b = x.to(compute_dtype(x)).chunk(2, dim=-1)
    grad = grad_output.to(a.dtype)
    below = 0.5 * torch.special.erfc(b * -(0.5**0.5))
    density = torch.exp(-0.5 * b.square()) / (2.0 * torch.pi) ** 0.5
    return stored_like(torch.cat((grad * (b * below), grad * a * (below + b * density)), dim=-1), x)
