"""A reward model's preprocessing, against torch's and Pillow's resizing and torchvision's and open_clip's geometry."""

from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from torch import Tensor

from diffpp_fast import ops

pytestmark = pytest.mark.usefixtures("backend")

F64 = torch.float64
MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
RESIZES: dict[str, st.SearchStrategy[Any]] = {
    "filter": st.sampled_from(["bicubic", "bilinear"]),
    "antialias": st.booleans(),
    "fit": st.sampled_from(["crop", "pad", "stretch"]),
    "clamp": st.sampled_from(["hard", "straight_through", "none"]),
}
UNIT = {"mean": (0.0,) * 3, "std": (1.0,) * 3, "value_range": (0.0, 1.0)}


def geometry(height: int, width: int, size: int, fit: str) -> tuple[int, int]:
    """The resized height and width: torchvision's Resize for "crop", open_clip's ResizeMaxSize for "pad"."""
    if fit == "stretch":
        return size, size
    if fit == "pad":
        scale = size / max(height, width)
        return max(1, round(height * scale)), max(1, round(width * scale))
    if height <= width:
        return size, int(size * width / height)
    return int(size * height / width), size


def formula(images: Tensor, size: int, filter: str, antialias: bool, fit: str, clamp: str) -> Tensor:
    pixels = (images + 1) / 2
    if clamp == "hard":
        pixels = pixels.clamp(0, 1)
    elif clamp == "straight_through":
        pixels = pixels + (pixels.clamp(0, 1) - pixels).detach()
    height, width = geometry(*images.shape[2:], size, fit)
    # torch has no antialiased resize in low precision on the CPU.
    work = torch.promote_types(pixels.dtype, torch.float32)
    resized = F.interpolate(
        pixels.to(work), size=(height, width), mode=filter, antialias=antialias, align_corners=False
    )
    pixels = resized.to(pixels.dtype)
    if fit == "crop":
        top, left = int(round((height - size) / 2.0)), int(round((width - size) / 2.0))  # noqa: RUF046
        pixels = pixels[:, :, top : top + size, left : left + size]
    top, left = (size - pixels.shape[2]) // 2, (size - pixels.shape[3]) // 2
    pixels = F.pad(pixels, (left, size - pixels.shape[3] - left, top, size - pixels.shape[2] - top))
    mean, std = (torch.tensor(values, dtype=images.dtype).reshape(3, 1, 1) for values in (MEAN, STD))
    return (pixels - mean) / std


@given(
    height=st.integers(1, 24),
    width=st.integers(1, 24),
    size=st.integers(1, 12),
    **RESIZES,
)
def test_formula_and_gradient(
    height: int, width: int, size: int, filter: str, antialias: bool, fit: str, clamp: str
) -> None:
    # torch's antialiased resize on the CPU repeats the first row when the output is one pixel wide.
    assume(not antialias or geometry(height, width, size, fit)[1] > 1)
    images = torch.randn(2, 3, height, width, dtype=F64, requires_grad=True)
    actual = ops.reward_pixels(
        images, size, mean=MEAN, std=STD, filter=filter, antialias=antialias, fit=fit, clamp=clamp
    )
    oracle = formula(images, size, filter, antialias, fit, clamp)
    torch.testing.assert_close(actual, oracle)
    outer = torch.randn_like(actual)
    torch.testing.assert_close(
        torch.autograd.grad(actual, images, outer)[0], torch.autograd.grad(oracle, images, outer)[0]
    )


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
@pytest.mark.parametrize("shape", [(37, 23), (23, 37), (5, 40)])
def test_clip_sizes(fit: str, shape: tuple[int, int]) -> None:
    images = torch.randn(1, 3, *shape, dtype=F64)
    actual = ops.reward_pixels(images, 28, mean=MEAN, std=STD, fit=fit)
    torch.testing.assert_close(actual, formula(images, 28, "bicubic", True, fit, "hard"))


@pytest.mark.parametrize(("filter", "resample"), [("bilinear", 2), ("bicubic", 3)])
@pytest.mark.parametrize("size", [17, 24, 90])
def test_pillow(filter: str, resample: int, size: int) -> None:
    """Pillow rounds to bytes after each of its two passes, so half a level each, and the filter's gain on the first."""
    image = pytest.importorskip("PIL.Image")
    y, x = np.mgrid[0:61, 0:61]
    channels = [127 + 100 * np.sin(0.11 * x + 0.23 * y), 127 + 90 * np.cos(0.2 * x - 0.1 * y), 2.0 * x + 2.0 * y]
    pixels = np.stack(channels, axis=-1).round().astype(np.uint8)
    expected = np.asarray(image.fromarray(pixels).resize((size, size), resample)).astype(np.float64)
    images = torch.from_numpy(pixels / 255.0).permute(2, 0, 1)[None]
    actual = ops.reward_pixels(images, size, filter=filter, **UNIT)[0].permute(1, 2, 0).numpy() * 255.0
    assert np.abs(actual - expected).max() < 1.2


def test_adjoint_identity() -> None:
    x = torch.randn(2, 3, 31, 45, dtype=F64, requires_grad=True)
    for options in ({}, {"filter": "bilinear"}, {"antialias": False}, {"fit": "pad"}, {"fit": "stretch"}):
        linear = ops.reward_pixels(x, 14, clamp="none", **UNIT, **options)
        y = torch.randn_like(linear)
        (adjoint,) = torch.autograd.grad(linear, x, y)
        torch.testing.assert_close((linear * y).sum(), (x * adjoint).sum(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
def test_gradcheck(fit: str) -> None:
    images = (torch.rand(1, 3, 7, 5, dtype=F64) - 0.5).requires_grad_()
    torch.autograd.gradcheck(lambda x: ops.reward_pixels(x, 4, mean=MEAN, std=STD, fit=fit), (images,))


def test_clamps() -> None:
    images = torch.tensor([-1.5, -1.0, 0.0, 1.0, 1.5], dtype=F64).reshape(1, 1, 1, 5).expand(1, 1, 5, 5)
    options = {"mean": (0.0,), "std": (1.0,), "fit": "stretch"}
    for clamp, row, slope in (
        ("hard", [0.0, 0.0, 0.5, 1.0, 1.0], [0.0, 0.5, 0.5, 0.5, 0.0]),
        ("straight_through", [0.0, 0.0, 0.5, 1.0, 1.0], [0.5] * 5),
        ("none", [-0.25, 0.0, 0.5, 1.0, 1.25], [0.5] * 5),
    ):
        x = images.clone().requires_grad_()
        pixels = ops.reward_pixels(x, 5, clamp=clamp, **options)
        pixels.sum().backward()
        torch.testing.assert_close(pixels[0, 0, 2].tolist(), row)
        torch.testing.assert_close(x.grad[0, 0, 2].tolist(), slope)


def test_padding_is_black() -> None:
    pixels = ops.reward_pixels(torch.ones(1, 3, 4, 8, dtype=F64), 8, mean=MEAN, std=STD, fit="pad")
    black, white = (((value - torch.tensor(MEAN)) / torch.tensor(STD)).double() for value in (0.0, 1.0))
    torch.testing.assert_close(pixels[0, :, 0, 0], black, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(pixels[0, :, 4, 4], white, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype, assert_twice_unfused: Callable[..., None]) -> None:
    images = (0.8 * torch.randn(2, 3, 40, 40)).to(dtype).requires_grad_()
    wide = images.detach().double().requires_grad_()
    actual = ops.reward_pixels(images, 16, mean=MEAN, std=STD)
    oracle = formula(wide, 16, "bicubic", True, "crop", "hard")
    unfused = formula(images, 16, "bicubic", True, "crop", "hard")
    assert_twice_unfused(actual, unfused, oracle)
    outer = torch.randn_like(actual)
    grads = (
        torch.autograd.grad(value, x, outer.to(value.dtype))[0]
        for value, x in ((actual, images), (unfused, images), (oracle, wide))
    )
    assert_twice_unfused(*grads)


def test_output_dtype() -> None:
    images = torch.randn(1, 3, 9, 9, requires_grad=True)
    pixels = ops.reward_pixels(images, 4, mean=MEAN, std=STD, dtype=torch.bfloat16)
    assert torch.equal(pixels, ops.reward_pixels(images, 4, mean=MEAN, std=STD).bfloat16())
    pixels.float().sum().backward()
    assert images.grad.dtype == torch.float32


def test_autocast_does_not_lower_the_arithmetic() -> None:
    images = torch.randn(1, 3, 19, 19)
    expected = ops.reward_pixels(images, 8, mean=MEAN, std=STD)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ops.reward_pixels(images, 8, mean=MEAN, std=STD), expected)


def test_layouts(layout: Callable[[Tensor], Tensor]) -> None:
    images = torch.randn(2, 3, 11, 17, requires_grad=True)
    expected = ops.reward_pixels(images, 6, mean=MEAN, std=STD)
    outer = torch.randn_like(expected)
    (expected_grad,) = torch.autograd.grad(expected, images, outer)
    laid_out = layout(images.detach()).requires_grad_()
    pixels = ops.reward_pixels(laid_out, 6, mean=MEAN, std=STD)
    torch.testing.assert_close(pixels, expected)
    (grad,) = torch.autograd.grad(pixels, laid_out, layout(outer))
    torch.testing.assert_close(grad, expected_grad)
    assert grad.stride() == torch.empty_like(laid_out).stride()
    channels_last = torch.channels_last
    assert pixels.is_contiguous(memory_format=channels_last) == laid_out.is_contiguous(memory_format=channels_last)


def test_empty_batch() -> None:
    images = torch.empty(0, 3, 8, 8, requires_grad=True)
    pixels = ops.reward_pixels(images, 4, mean=MEAN, std=STD)
    assert pixels.shape == (0, 3, 4, 4)
    pixels.sum().backward()
    assert images.grad.shape == images.shape


def test_errors_name_what_is_wrong() -> None:
    images = torch.zeros(1, 3, 8, 8)
    options = {"mean": MEAN, "std": STD}
    for wrong, message in (
        ({"filter": "lanczos"}, "reward_pixels: unknown filter 'lanczos'; known: bilinear, bicubic"),
        ({"fit": "cover"}, "reward_pixels: unknown fit 'cover'; known: crop, pad, stretch"),
        ({"clamp": "soft"}, "reward_pixels: unknown clamp 'soft'"),
        ({"mean": (0.5,)}, "reward_pixels: 3 channels, but 1 values of mean and 3 of std"),
        ({"std": (1.0, 0.0, 1.0)}, "reward_pixels: std must not be zero"),
        ({"value_range": (1.0, 1.0)}, "reward_pixels: value_range must increase"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.reward_pixels(images, 4, **{**options, **wrong})
    with pytest.raises(ValueError, match="reward_pixels: size must be at least 1, got 0"):
        ops.reward_pixels(images, 0, **options)
    with pytest.raises(ValueError, match=r"reward_pixels: images must have shape \[B, C, H, W\] with pixels"):
        ops.reward_pixels(images[0], 4, **options)
    with pytest.raises(ValueError, match=r"with pixels, got \[1, 3, 0, 8\]"):
        ops.reward_pixels(images[:, :, :0], 4, **options)
    with pytest.raises(TypeError, match="reward_pixels: images must be float32"):
        ops.reward_pixels(images.byte(), 4, **options)
    with pytest.raises(TypeError, match="reward_pixels: dtype must be float32"):
        ops.reward_pixels(images, 4, dtype=torch.uint8, **options)
