"""From a decoder's images to a reward model's input, differentiably, in one operator.

Resizing is separable and linear, and so are cropping and zero-padding: each axis is one matrix [size, in].
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache, wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from diffpp_fast import transforms
from diffpp_fast.arguments import integer, numbers
from diffpp_fast.availability import fake
from diffpp_fast.backends import kernels, register
from diffpp_fast.ops import checks
from diffpp_fast.ops.autograd import needs_gradient, recorded
from diffpp_fast.plain import compute_dtype, stored_like

# Kernels get positions in these, which are those of the enumerations of csrc/reward_pixels/arguments.h.
FILTERS = ("bilinear", "bicubic")
FITS = ("crop", "pad", "stretch")
CLAMPS = ("hard", "straight_through", "none")
#: Half the width of each filter at scale 1, in pixels.
SUPPORT = {"bilinear": 1.0, "bicubic": 2.0}


def reward_pixels(
    images: Tensor,
    size: int,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    filter: str = "bicubic",
    antialias: bool = True,
    fit: str = "crop",
    value_range: tuple[float, float] = (-1.0, 1.0),
    clamp: str = "hard",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Value range to [0, 1], clamp, resize, crop or pad, normalise, cast.

    Args:
        images: [B, C, H, W], values in `value_range`.
        size: side of the square output, in pixels.
        mean: C numbers subtracted from the [0, 1] pixels.
        std: C numbers that they are then divided by.
        filter: "bicubic" or "bilinear".
        antialias: True resizes as PIL, and as torch with antialias=True (cubic a = -0.5, support scaled when
            shrinking, weights normalised at the border). False resizes as torch with antialias=False (cubic a = -0.75,
            border repeated).
        fit: "crop" takes the short side to `size` and cuts the centre, as CLIP; "pad" takes the long side to `size` and
            centres the image on zeros (black: -mean/std once normalised), as HPSv2.1; "stretch" ignores the aspect.
        value_range: what becomes 0 and 1; (-1, 1) is a VAE decoder's.
        clamp: "hard" clamps to [0, 1] and stops the gradient of pixels outside; "straight_through" clamps and lets it
            through; "none" does not clamp. Resizing comes after and bicubic overshoots by a few percent, unclamped.
        dtype: of the output, cast after the arithmetic; None for that of `images`. The gradient has that of `images`.

    Returns:
        [B, C, size, size], channels_last if `images` is. An empty batch gives an empty result. A NaN reaches the
        outputs whose window holds it (in "reference", which multiplies by whole matrices, its plane); with "hard" it
        gets gradient 0, and infinity is clamped.

    Transforms:
        Kernels compute the pixels and the gradient of `images`, which is the exact adjoint and keeps these alone. Plain
        torch computes second derivatives, tangents (forward mode) and what `torch.func` makes of the operator, `vmap`
        among it; all are exact, with "straight_through" as the identity where the clamp was.

    Raises:
        TypeError: `images` or `dtype` is not floating-point, or another argument not of the type that is named above.
        ValueError: a shape, a length, a number or an option that is not among the above.
    """
    op = "reward_pixels"
    checks.floating(op, {"images": images})
    if images.dim() != 4 or (images.numel() == 0 and 0 in images.shape[1:]):
        raise ValueError(f"{op}: images must have shape [B, C, H, W] with pixels, got {list(images.shape)}")
    size = integer(op, "size", size)
    if size < 1:
        raise ValueError(f"{op}: size must be at least 1, got {size}")
    means, stds, limits = numbers(op, "mean", mean), numbers(op, "std", std), numbers(op, "value_range", value_range)
    channels = images.shape[1]
    if len(means) != channels or len(stds) != channels:
        raise ValueError(
            f"{op}: {channels} channels, but {len(means)} values of mean and {len(stds)} of std; "
            f"images are [B, C, H, W], got {list(images.shape)}"
        )
    if min(stds) <= 0.0:
        raise ValueError(f"{op}: std must not be zero or negative, got {list(stds)}")
    if len(limits) != 2 or not limits[0] < limits[1]:
        raise ValueError(f"{op}: value_range must increase from one number to another, got {limits}")
    checks.true_or_false(op, "antialias", antialias)
    checks.one_of(op, "filter", filter, FILTERS)
    checks.one_of(op, "fit", fit, FITS)
    checks.one_of(op, "clamp", clamp, CLAMPS)
    dtype = images.dtype if dtype is None else dtype
    if not isinstance(dtype, torch.dtype) or dtype not in checks.DTYPES:
        raise TypeError(f"{op}: dtype must be float32, bfloat16, float16 or float64, got {dtype}")
    resize = FILTERS.index(filter), antialias, FITS.index(fit)
    arguments = size, means, stds, *resize, limits[0], limits[1], CLAMPS.index(clamp)
    pixels: Tensor
    if transforms.active():
        pixels = forward(images, *arguments, dtype)
    elif needs_gradient(images):
        pixels = _RewardPixels.apply(images, arguments, dtype)
    else:
        pixels = kernels(op, images.device, images.dtype, images.numel()).forward(images, *arguments, dtype)
    return pixels


def forward(
    images: Tensor,
    size: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    filter: int,
    antialias: bool,
    fit: int,
    low: float,
    high: float,
    clamp: int,
    dtype: torch.dtype,
) -> Tensor:
    """Return the pixels, with one matrix for each axis. filter, fit and clamp are positions in their names."""
    work = compute_dtype(images)
    pixels = (images.to(work) - low) / (high - low)
    if CLAMPS[clamp] == "hard":
        pixels = pixels.clamp(0.0, 1.0)
    elif CLAMPS[clamp] == "straight_through":
        # The difference is 0, or NaN where a pixel is infinite, and has the derivative of the identity.
        pixels = pixels.clamp(0.0, 1.0).detach() + (pixels - pixels.detach()).nan_to_num(nan=0.0)
    rows, columns = _matrices(images, size, FITS[fit], FILTERS[filter], antialias)
    resized = _apply(rows, pixels, columns.T)
    means, stds = (_per_channel(values, images.device, work) for values in (mean, std))
    pixels = (resized - means) / stds
    if transforms.functional():  # which hides the layout
        return pixels.to(dtype)
    return pixels.to(dtype, memory_format=_memory_format(images))


def backward(
    grad_output: Tensor,
    images: Tensor,
    size: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    filter: int,
    antialias: bool,
    fit: int,
    low: float,
    high: float,
    clamp: int,
) -> Tensor:
    """Return the exact adjoint of `forward`'s linear part; zero where "hard" clamped."""
    work = compute_dtype(images)
    rows, columns = _matrices(images, size, FITS[fit], FILTERS[filter], antialias)
    grad = _apply(rows.T, grad_output.to(work) / _per_channel(std, images.device, work), columns)
    if CLAMPS[clamp] == "hard":
        pixels = (images.to(work) - low) / (high - low)
        grad = grad * ((pixels >= 0.0) & (pixels <= 1.0))
    return stored_like(grad / (high - low), images)


def _memory_format(images: Tensor) -> torch.memory_format:
    channels_last = images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()
    return torch.channels_last if channels_last else torch.contiguous_format


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


def _matrices(images: Tensor, size: int, fit: str, filter: str, antialias: bool) -> tuple[Tensor, Tensor]:
    """Return the matrices of the rows and of the columns, on the device of `images` in its compute dtype."""
    height, width = images.shape[2:]
    place = images.device, compute_dtype(images)
    return (
        _axis_matrix_on(*place, height, width, size, fit, filter, antialias),
        _axis_matrix_on(*place, width, height, size, fit, filter, antialias),
    )


def _kept(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return `make` with its results kept, so that a second call copies nothing to the device."""
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


class _RewardPixels(Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, arguments: tuple[Any, ...], dtype: torch.dtype) -> Tensor:
        ctx.kernels = kernels("reward_pixels", images.device, images.dtype, images.numel())
        ctx.arguments = arguments
        ctx.save_for_backward(images)
        pixels: Tensor = ctx.kernels.forward(images, *arguments, dtype)
        return pixels

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (images,) = ctx.saved_tensors
        differentiate = backward if recorded(grad_output) else ctx.kernels.backward
        return differentiate(grad_output, images, *ctx.arguments), None, None


def _fake(images: Tensor, size: int, *others: Any) -> Tensor:
    shape = *images.shape[:2], size, size
    return torch.empty(shape, dtype=others[-1], device=images.device, memory_format=_memory_format(images))


register("reward_pixels", forward=forward, backward=backward)
fake("reward_pixels", _fake)
fake("reward_pixels_backward", lambda grad_output, images, *others: torch.empty_like(images))
