"""The compiled reward_pixels: registration, threads, layouts, sizes. The formula is in test_ops_reward_pixels.py."""

from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from native import assert_compiles_once, assert_same_bits_for_any_threads, check_registration
from test_ops_reward_pixels import MEAN, RESIZES, STD
from torch import Tensor

from diffpp_fast import ops, use_backend

pytestmark = pytest.mark.usefixtures("cpu_backend")

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BICUBIC, CROP, HARD = 1, 0, 0  # in the schemas
OPTIONS = (list(MEAN), list(STD), BICUBIC, True, CROP, -1.0, 1.0, HARD)


def both_ways(images: Tensor, outer: Tensor, size: int, **options: Any) -> tuple[Tensor, Tensor]:
    """The pixels and the gradient of the images."""
    images = images.detach().requires_grad_()
    pixels = ops.reward_pixels(images, size, **{"mean": MEAN, "std": STD, **options})
    (grad,) = torch.autograd.grad(pixels, images, outer)
    return pixels.detach(), grad


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_registration(dtype: torch.dtype, memory_format: torch.memory_format, cpu_backend: Any) -> None:
    images = torch.randn(2, 3, 9, 7).to(dtype).contiguous(memory_format=memory_format)
    grad = torch.randn(2, 3, 4, 4)
    for result in (dtype, torch.bfloat16):
        check_registration(cpu_backend.reward_pixels.default, images, 4, *OPTIONS, result)
        check_registration(cpu_backend.reward_pixels_backward.default, grad.to(result), images, 4, *OPTIONS)


def test_same_bits_for_any_threads() -> None:
    images, outer = torch.randn(3, 3, 67, 131), torch.randn(3, 3, 61, 61)
    assert_same_bits_for_any_threads(lambda: both_ways(images, outer, 61))
    channels_last = images.contiguous(memory_format=torch.channels_last)
    assert_same_bits_for_any_threads(lambda: both_ways(channels_last, outer, 61, fit="stretch"))


def test_compiles_once() -> None:
    def pixels(images: Tensor) -> Tensor:
        return ops.reward_pixels(images, 7, mean=MEAN, std=STD, dtype=torch.float64)

    assert_compiles_once(pixels, *((torch.randn(2, 3, 16, 12, requires_grad=True),) for _ in range(3)))


@given(
    batch=st.integers(0, 2),
    channels=st.integers(1, 5),
    height=st.integers(1, 70),
    width=st.integers(1, 70),
    size=st.integers(1, 40),
    **RESIZES,
    memory_format=st.sampled_from([torch.contiguous_format, torch.channels_last]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_any_size_agrees_with_the_reference(
    batch: int,
    channels: int,
    height: int,
    width: int,
    size: int,
    memory_format: torch.memory_format,
    dtype: torch.dtype,
    **options: Any,
) -> None:
    images = torch.randn(batch, channels, height, width, dtype=dtype).contiguous(memory_format=memory_format)
    outer = torch.randn(batch, channels, size, size, dtype=dtype)
    options.update(mean=[0.1 * c for c in range(channels)], std=[0.2 + 0.1 * c for c in range(channels)])
    actual = both_ways(images, outer, size, **options)
    with use_backend("reference"):
        expected = both_ways(images, outer, size, **options)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    for value, oracle in zip(actual, expected, strict=True):
        torch.testing.assert_close(value, oracle, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", [(2, 3, 700, 31), (1, 2, 31, 1100), (1, 3, 40, 300), (1, 3, 24, 32)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
def test_rows_of_several_tiles(shape: tuple[int, ...], memory_format: torch.memory_format, fit: str) -> None:
    size = 600 if shape[2] < 30 else 35
    images = torch.randn(shape, dtype=torch.float64).contiguous(memory_format=memory_format)
    outer = torch.randn(*shape[:2], size, size, dtype=torch.float64)
    options = {"fit": fit, "mean": MEAN[: shape[1]], "std": STD[: shape[1]]}
    actual = both_ways(images, outer, size, **options)
    with use_backend("reference"):
        expected = both_ways(images, outer, size, **options)
    for value, oracle in zip(actual, expected, strict=True):
        torch.testing.assert_close(value, oracle, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("channels", [511, 512, 513])
def test_many_channels_in_channels_last(channels: int) -> None:
    images = torch.randn(2, channels, 5, 6).contiguous(memory_format=torch.channels_last)
    outer = torch.randn(2, channels, 3, 3)
    options = {"mean": torch.rand(channels).tolist(), "std": (0.5 + torch.rand(channels)).tolist()}
    actual = both_ways(images, outer, 3, **options)
    expected = both_ways(images.contiguous(), outer, 3, **options)
    for value, other in zip(actual, expected, strict=True):
        assert torch.equal(value, other)
        assert value.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts_hold_the_same_numbers(layout: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    images = torch.randn(2, 3, 37, 23).to(dtype)
    outer = torch.randn(2, 3, 19, 19).to(dtype)
    expected = both_ways(images, outer, 19)
    for images_layout, outer_layout in ((layout, lambda x: x), (lambda x: x, layout), (layout, layout)):
        actual = both_ways(images_layout(images), outer_layout(outer), 19)
        for value, other in zip(actual, expected, strict=True):
            assert torch.equal(value, other)


@pytest.mark.parametrize("images_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_any_pair_of_dtypes(images_dtype: torch.dtype, dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    """Rounded once at the end: the same as casting what the arithmetic's dtype gives."""
    images = torch.randn(2, 3, 20, 33).to(images_dtype).contiguous(memory_format=memory_format)
    outer = torch.randn(2, 3, 18, 18).to(dtype)
    pixels, grad = both_ways(images, outer, 18, dtype=dtype)
    work = torch.float64 if images_dtype == torch.float64 else torch.float32
    expected, expected_grad = both_ways(images.to(work), outer.to(work), 18)
    assert pixels.dtype == dtype and grad.dtype == images_dtype
    assert torch.equal(pixels, expected.to(dtype))
    assert torch.equal(grad, expected_grad.to(images_dtype))


def test_cropped_pixels_get_no_gradient_and_every_pixel_a_number() -> None:
    images, outer = 0.1 * torch.randn(1, 3, 16, 64), torch.randn(1, 3, 8, 8)
    _, grad = both_ways(images, outer, 8)
    # The crop is columns 24 to 40; the filter reaches 4 pixels on.
    assert (grad[..., :20] == 0.0).all() and (grad[..., 44:] == 0.0).all()
    assert (grad[..., 24:40] != 0.0).all()


def test_size_kept_is_exact() -> None:
    images = torch.rand(2, 3, 21, 21)
    unit = {"mean": (0.0,) * 3, "std": (1.0,) * 3, "value_range": (0.0, 1.0)}
    for filter in ("bicubic", "bilinear"):
        for antialias in (False, True):
            assert torch.equal(ops.reward_pixels(images, 21, filter=filter, antialias=antialias, **unit), images)


def test_the_ends_of_the_range_are_inside() -> None:
    for low, high in ((0.0, 255.0), (-1.0, 1.0), (0.1, 0.7), (-3.0, 0.3)):
        images = torch.tensor([low, high]).reshape(1, 1, 1, 2).expand(1, 1, 2, 2)
        options = {"mean": [0.0], "std": [1.0], "value_range": (low, high)}
        pixels, grad = both_ways(images, torch.ones(1, 1, 2, 2), 2, **options)
        torch.testing.assert_close(pixels, torch.tensor([0.0, 1.0]).expand(1, 1, 2, 2))
        torch.testing.assert_close(grad, torch.full((1, 1, 2, 2), 1.0 / (high - low)))


def test_nan_stays_where_the_filter_reaches() -> None:
    images = torch.zeros(1, 3, 64, 64)
    images[0, 1, 32, 32] = torch.nan
    for clamp in ("hard", "straight_through", "none"):
        pixels, grad = both_ways(images, torch.ones(1, 3, 16, 16), 16, clamp=clamp)
        assert pixels[0, 1, 6:10, 6:10].isnan().all()
        assert pixels.isnan().sum() == 16
        assert grad[0, 1, 32, 32] == 0.0 if clamp == "hard" else not grad.isnan().any()


def test_inputs_are_not_written() -> None:
    images, outer = torch.randn(2, 3, 9, 8), torch.randn(2, 3, 5, 5)
    copies = images.clone(), outer.clone()
    both_ways(images, outer, 5)
    assert torch.equal(images, copies[0]) and torch.equal(outer, copies[1])


def test_the_binding_itself_refuses_what_it_does_not_serve(cpu_backend: Any) -> None:
    images = torch.zeros(1, 3, 8, 8)
    mean, std, *rest = OPTIONS
    for changed, message in (
        ({"images": images.int()}, "reward_pixels: images must be float32, bfloat16, float16 or float64, got Int"),
        ({"images": images[0]}, r"reward_pixels: images must have shape \[B, C, H, W\] with pixels"),
        ({"images": images[:, :, :0]}, r"reward_pixels: images must have shape \[B, C, H, W\] with pixels"),
        ({"size": 0}, "reward_pixels: size must be at least 1, got 0"),
        ({"mean": mean[:2]}, "reward_pixels: mean and std must have 3 values"),
        ({"std": []}, "reward_pixels: mean and std must have 3 values"),
        ({"filter": 2}, r"reward_pixels: filter must be in \[0, 1\], got 2"),
        ({"fit": 3}, r"reward_pixels: fit must be in \[0, 2\], got 3"),
        ({"clamp": -1}, r"reward_pixels: clamp must be in \[0, 2\], got -1"),
        ({"dtype": torch.int32}, "reward_pixels: the result must be float32"),
    ):
        names = ("images", "size", "mean", "std", "filter", "antialias", "fit", "low", "high", "clamp", "dtype")
        arguments = dict(zip(names, (images, 4, mean, std, *rest, torch.float32), strict=True))
        with pytest.raises(RuntimeError, match=message):
            cpu_backend.reward_pixels.default(*{**arguments, **changed}.values())
    with pytest.raises(RuntimeError, match=r"reward_pixels_backward: grad_output must have shape \[B, C, size, size\]"):
        cpu_backend.reward_pixels_backward.default(torch.zeros(1, 3, 4, 5), images, 4, *OPTIONS)


def test_fakes_beyond_2_to_the_31_elements(cpu_backend: Any) -> None:
    with torch.device("meta"):
        images = torch.empty(2, 3, 2**16, 2**15, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
        pixels = cpu_backend.reward_pixels.default(images, 2**15, *OPTIONS, torch.float32)
        grad = cpu_backend.reward_pixels_backward.default(pixels, images, 2**15, *OPTIONS)
    assert pixels.shape == (2, 3, 2**15, 2**15) and pixels.dtype == torch.float32
    assert pixels.is_contiguous(memory_format=torch.channels_last)
    assert grad.shape == images.shape and grad.stride() == images.stride() and grad.dtype == images.dtype


@pytest.mark.slow
def test_more_than_2_to_the_31_elements() -> None:
    images = torch.zeros(2, 1, 2**15, 2**15 + 3, dtype=torch.bfloat16)
    images[1] = 0.5
    images[1, :, -1] = 1.0
    options = {"mean": [0.0], "std": [1.0], "fit": "stretch", "antialias": False}
    pixels, grad = both_ways(images, torch.ones(2, 1, 8, 8, dtype=torch.bfloat16), 8, **options)
    assert (pixels[0] == 0.5).all() and (pixels[1] == 0.75).all()
    torch.testing.assert_close(grad[1].sum(dtype=torch.float64).item(), 32.0, rtol=1e-3, atol=0.0)
