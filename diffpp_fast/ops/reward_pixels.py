"""From a decoder's images to a reward model's input, differentiably, in one operator."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from diffpp_fast import transforms
from diffpp_fast.arguments import integer, numbers, shown
from diffpp_fast.kernels import dispatch
from diffpp_fast.kernels.reference import reward_pixels as definition
from diffpp_fast.kernels.reference.reward_pixels import SUPPORT, Preprocessing
from diffpp_fast.ops import checks
from diffpp_fast.ops.autograd import needs_gradient, recorded

FILTERS = tuple(SUPPORT)
FITS = ("crop", "pad", "stretch")
CLAMPS = ("hard", "straight_through", "none")


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
        dtype: of the output; None for that of `images`.

    Returns:
        [B, C, size, size], channels_last if `images` is. An empty batch gives an empty result.

    Transforms:
        Kernels compute the pixels and the gradient of `images`, which is the exact adjoint. Plain torch computes second
        derivatives, tangents (forward mode) and what `torch.func` makes of the operator, `vmap` among it; all are
        exact, with "straight_through" as the identity where the clamp was.

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
    if not isinstance(antialias, bool):
        raise TypeError(f"{op}: antialias must be True or False, got {shown(antialias)}")
    checks.one_of(op, "filter", filter, FILTERS)
    checks.one_of(op, "fit", fit, FITS)
    checks.one_of(op, "clamp", clamp, CLAMPS)
    dtype = images.dtype if dtype is None else dtype
    if not isinstance(dtype, torch.dtype) or dtype not in checks.DTYPES:
        raise TypeError(f"{op}: dtype must be float32, bfloat16, float16 or float64, got {dtype}")
    preprocessing = Preprocessing(size, means, stds, filter, antialias, fit, (limits[0], limits[1]), clamp)
    pixels: Tensor
    if transforms.active():
        pixels = definition.forward(images, preprocessing, dtype)
    elif needs_gradient(images):
        pixels = _RewardPixels.apply(images, preprocessing, dtype)
    else:
        pixels = dispatch.select(op, images.device, images.dtype).forward(images, preprocessing, dtype)
    return pixels


class _RewardPixels(Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, preprocessing: Preprocessing, dtype: torch.dtype) -> Tensor:
        ctx.kernels = dispatch.select("reward_pixels", images.device, images.dtype)
        ctx.preprocessing = preprocessing
        ctx.save_for_backward(images)
        pixels: Tensor = ctx.kernels.forward(images, preprocessing, dtype)
        return pixels

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        kernels = definition if recorded() else ctx.kernels
        return kernels.backward(grad_output, *ctx.saved_tensors, ctx.preprocessing), None, None
