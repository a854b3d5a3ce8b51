"""Shared pieces of the definitions in plain torch: the dtype of arithmetic, numbers per sample, layouts."""

import torch
from torch import Tensor

from diffpp_fast import transforms


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which a tensor's arithmetic is done: float32, float64 for float64."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """[B] -> [B, 1, ..., 1] in the compute dtype of `like` ([B, ...])."""
    return values.to(compute_dtype(like)).reshape(-1, *[1] * (like.dim() - 1))


def sum_per_sample(values: Tensor) -> Tensor:
    """[B, ...] -> [B]."""
    return values.reshape(values.shape[0], values[:1].numel()).sum(dim=1)


def mean_abs_per_sample(values: Tensor) -> Tensor:
    """[B, ...] -> [B]."""
    return sum_per_sample(values.abs()) / values[:1].numel()


def stored_like(result: Tensor, like: Tensor) -> Tensor:
    """`result` in the dtype and memory layout of `like`; where a `vmap` hides the layout, in the dtype alone."""
    if transforms.functional() or transforms.batched(result):
        return result.to(like.dtype)
    return torch.empty_like(like).copy_(result)
