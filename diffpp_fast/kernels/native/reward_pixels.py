"""A reward model's preprocessing: value range, clamp, resize, crop or pad, normalise and cast in one pass."""

from typing import Any

import torch
from torch import Tensor
from torch.library import register_fake

from diffpp_fast.kernels.reference.reward_pixels import Preprocessing

_ops = torch.ops.diffpp_fast

# In the order of the enumerations of csrc/reward_pixels/arguments.h.
FILTERS = ("bilinear", "bicubic")
FITS = ("crop", "pad", "stretch")
CLAMPS = ("hard", "straight_through", "none")


def forward(images: Tensor, preprocessing: Preprocessing, dtype: torch.dtype) -> Tensor:
    pixels: Tensor = _ops.reward_pixels.default(images, *_arguments(preprocessing), dtype)
    return pixels


def backward(grad_output: Tensor, images: Tensor, preprocessing: Preprocessing) -> Tensor:
    grad_images: Tensor = _ops.reward_pixels_backward.default(grad_output, images, *_arguments(preprocessing))
    return grad_images


def _arguments(preprocessing: Preprocessing) -> tuple[Any, ...]:
    size, mean, std, filter, antialias, fit, (low, high), clamp = preprocessing
    return (
        size, mean, std, FILTERS.index(filter), antialias, FITS.index(fit), low, high, CLAMPS.index(clamp)
    )  # fmt: skip


@register_fake("diffpp_fast::reward_pixels")
def _(
    images: Tensor,
    size: int,
    mean: list[float],
    std: list[float],
    filter: int,
    antialias: bool,
    fit: int,
    low: float,
    high: float,
    clamp: int,
    dtype: torch.dtype,
) -> Tensor:
    channels_last = images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    batch, channels = images.shape[:2]
    return torch.empty((batch, channels, size, size), dtype=dtype, device=images.device, memory_format=memory_format)


@register_fake("diffpp_fast::reward_pixels_backward")
def _(
    grad_output: Tensor,
    images: Tensor,
    size: int,
    mean: list[float],
    std: list[float],
    filter: int,
    antialias: bool,
    fit: int,
    low: float,
    high: float,
    clamp: int,
) -> Tensor:
    return torch.empty_like(images)
