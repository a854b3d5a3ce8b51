"""Addressed random numbers as tensors."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.library import register_fake

from diffpp_fast.kernels.native import signed
from diffpp_fast.kernels.reference.philox import Address

_ops = torch.ops.diffpp_fast


def normal(address: Address, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    count = math.prod(shape)
    drawn: Tensor = _ops.normal.default(address.samples, signed(address.seed), address.stream, count, dtype)
    return drawn.view(address.samples.shape[0], *shape)


def uniform(address: Address) -> Tensor:
    drawn: Tensor = _ops.uniform.default(address.samples, signed(address.seed), address.stream)
    return drawn


def integers(address: Address, low: int, high: int) -> Tensor:
    drawn: Tensor = _ops.integers.default(address.samples, signed(address.seed), address.stream, low, high - low)
    return drawn


@register_fake("diffpp_fast::normal")
def _(samples: Tensor, seed: int, stream: int, count: int, dtype: torch.dtype) -> Tensor:
    return samples.new_empty((samples.shape[0], count), dtype=dtype)


@register_fake("diffpp_fast::uniform")
def _(samples: Tensor, seed: int, stream: int) -> Tensor:
    return samples.new_empty(samples.shape, dtype=torch.float32)


@register_fake("diffpp_fast::integers")
def _(samples: Tensor, seed: int, stream: int, low: int, range: int) -> Tensor:
    return samples.new_empty(samples.shape)
