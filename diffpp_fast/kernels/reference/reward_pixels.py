"""A reward model's preprocessing: value range to [0, 1], clamp, resize, crop or pad, normalise, as linear maps.

Resizing is separable and linear, and so are cropping and zero-padding: each axis is one matrix [size, in].
"""

import math
from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffpp_fast import transforms
from diffpp_fast.kernels.reference import compute_dtype, stored_like

# Half the width of each filter at scale 1, in pixels.
SUPPORT = {"bilinear": 1.0, "bicubic": 2.0}


class Preprocessing(NamedTuple):
    """The arguments of `ops.reward_pixels`, hashable."""

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    filter: str
    antialias: bool
    fit: str
    value_range: tuple[float, float]
    clamp: str


def forward(images: Tensor, preprocessing: Preprocessing, dtype: torch.dtype) -> Tensor:
    """[B, C, H, W] -> [B, C, size, size] in `dtype`, channels_last if `images` is."""
    work = compute_dtype(images)
    low, high = preprocessing.value_range
    pixels = (images.to(work) - low) / (high - low)
    if preprocessing.clamp == "hard":
        pixels = pixels.clamp(0.0, 1.0)
    elif preprocessing.clamp == "straight_through":
        # The difference is 0, or NaN where a pixel is infinite, and has the derivative of the identity.
        pixels = pixels.clamp(0.0, 1.0).detach() + (pixels - pixels.detach()).nan_to_num(nan=0.0)
    rows, columns = _matrices(images, preprocessing)
    resized = _apply(rows, pixels, columns.T)
    mean, std = (_per_channel(values, images.device, work) for values in (preprocessing.mean, preprocessing.std))
    pixels = (resized - mean) / std
    if transforms.functional():  # which hides the layout
        return pixels.to(dtype)
    channels_last = images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return pixels.to(dtype, memory_format=memory_format)


def backward(grad_output: Tensor, images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """The exact adjoint of `forward`'s linear part; zero where "hard" clamped."""
    work = compute_dtype(images)
    low, high = preprocessing.value_range
    std = _per_channel(preprocessing.std, images.device, work)
    rows, columns = _matrices(images, preprocessing)
    grad = _apply(rows.T, grad_output.to(work) / std, columns)
    if preprocessing.clamp == "hard":
        pixels = (images.to(work) - low) / (high - low)
        grad = grad * ((pixels >= 0.0) & (pixels <= 1.0))
    return stored_like(grad / (high - low), images)


def axis_matrix(in_size: int, other_in_size: int, size: int, fit: str, filter: str, antialias: bool) -> Tensor:
    """The map of one axis, float64 [size, in_size], when the image's other side is `other_in_size`.

    "crop" takes the short side to `size` and the centre of the long one, with torchvision's rounding of the resized
    length and of the offset; "pad" takes the long side to `size` and centres the short one between rows of zeros, with
    open_clip's rounding; "stretch" takes each side to `size`.
    """
    if fit == "crop" and in_size > other_in_size:
        resized = int(size * in_size / other_in_size)
        top = round((resized - size) / 2.0)
        return filter_matrix(in_size, resized, filter, antialias)[top : top + size]
    if fit == "pad" and in_size < other_in_size:
        resized = max(1, round(in_size * (size / other_in_size)))
        top = (size - resized) // 2
        matrix = torch.zeros(size, in_size, dtype=torch.float64)
        matrix[top : top + resized] = filter_matrix(in_size, resized, filter, antialias)
        return matrix
    return filter_matrix(in_size, size, filter, antialias)


def filter_matrix(in_size: int, out_size: int, filter: str, antialias: bool) -> Tensor:
    """Resizing one axis, float64 [out_size, in_size], align_corners = False.

    With `antialias` as PIL and torch: the filter is widened when shrinking, cut at the border and normalised, and the
    cubic has a = -0.5. Without, as torch: the border pixel is repeated, and the cubic has a = -0.75.
    """
    scale = in_size / out_size
    stretch = max(scale, 1.0) if antialias else 1.0
    support = SUPPORT[filter] * stretch
    center = (torch.arange(out_size, dtype=torch.float64) + 0.5) * scale
    first = torch.floor(center - support + 0.5)
    end = torch.floor(center + support + 0.5)
    taps = math.ceil(2 * support) + 1
    index = first[:, None] + torch.arange(taps)
    distance = ((index - center[:, None] + 0.5) / stretch).abs()
    weight = _triangle(distance) if filter == "bilinear" else _cubic(distance, -0.5 if antialias else -0.75)
    inside = index < end[:, None]
    if antialias:
        inside &= (index >= 0) & (index < in_size)
    weight = weight * inside
    weight = weight / weight.sum(dim=1, keepdim=True)
    border = index.clamp(0, in_size - 1).to(torch.int64)
    return torch.zeros(out_size, in_size, dtype=torch.float64).scatter_add_(1, border, weight)


def _triangle(distance: Tensor) -> Tensor:
    return (1.0 - distance).clamp(min=0.0)


def _cubic(distance: Tensor, a: float) -> Tensor:
    """Keys' cubic convolution kernel."""
    near = ((a + 2.0) * distance - (a + 3.0)) * distance.square() + 1.0
    far = (((distance - 5.0) * distance + 8.0) * distance - 4.0) * a
    return torch.where(distance < 1.0, near, torch.where(distance < 2.0, far, 0.0))


def _apply(left: Tensor, pixels: Tensor, right: Tensor) -> Tensor:
    if not torch.amp.is_autocast_available(pixels.device.type):  # on meta
        return left @ (pixels @ right)
    # Under autocast the products would be made in low precision.
    with torch.autocast(pixels.device.type, enabled=False):
        return left @ (pixels @ right)


def _matrices(images: Tensor, spec: Preprocessing) -> tuple[Tensor, Tensor]:
    """The matrices of the rows and of the columns, on the device of `images` in its compute dtype."""
    height, width = images.shape[2:]
    place = images.device, compute_dtype(images)
    return (
        _axis_matrix_on(*place, height, width, spec.size, spec.fit, spec.filter, spec.antialias),
        _axis_matrix_on(*place, width, height, spec.size, spec.fit, spec.filter, spec.antialias),
    )


def _kept(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`make` with its results kept, so that a second call copies nothing to the device."""
    cached = lru_cache(maxsize=256)(make)

    @wraps(make)
    def call(*arguments: Any) -> Tensor:
        # Tensors that are made in a transform or in inference mode are of no use outside.
        if transforms.active() or torch.is_inference_mode_enabled():
            return make(*arguments)
        return cached(*arguments)

    return call


@_kept
def _axis_matrix_on(
    device: torch.device,
    dtype: torch.dtype,
    in_size: int,
    other_in_size: int,
    size: int,
    fit: str,
    filter: str,
    antialias: bool,
) -> Tensor:
    return axis_matrix(in_size, other_in_size, size, fit, filter, antialias).to(device, dtype)


@_kept
def _per_channel(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.tensor(values, device=device, dtype=dtype)[:, None, None]
