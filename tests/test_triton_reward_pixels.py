"""The Triton kernels of reward_pixels, in the interpreter where there is no GPU."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from diffpp_fast import ops, use_backend
from diffpp_fast.ops.reward_pixels import axis_matrix
from diffpp_fast.ops.triton import reward_pixels as kernels

# The interpreter truncates casts to bfloat16 instead of rounding them.
DTYPES = (
    (torch.float32, torch.float16) if not torch.cuda.is_available() else (torch.float32, torch.float16, torch.bfloat16)
)
TOLERANCE = {torch.float64: 3e-6, torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
UNIT = {"mean": (0.0,), "std": (1.0,), "value_range": (0.0, 1.0)}
FORMATS = (torch.contiguous_format, torch.channels_last)


def both_ways(images: Tensor, outer: Tensor, size: int, **options: Any) -> tuple[Tensor, Tensor]:
    """The pixels and the gradient of the images."""
    images = images.detach().requires_grad_()
    channels = images.shape[1]
    pixels = ops.reward_pixels(images, size, **{"mean": MEAN[:channels], "std": STD[:channels], **options})
    (grad,) = torch.autograd.grad(pixels, images, outer)
    return pixels.detach(), grad


def assert_agrees(images: Tensor, size: int, dtype: torch.dtype | None = None, **options: Any) -> None:
    dtype = images.dtype if dtype is None else dtype
    outer = torch.randn(*images.shape[:2], size, size).to(images.device, dtype)
    pixels, grad = both_ways(images, outer, size, dtype=dtype, **options)
    with use_backend("reference"):
        expected_pixels, expected_grad = both_ways(images.double(), outer.double(), size, **options)
    assert pixels.dtype == dtype and grad.dtype == images.dtype
    for value, oracle in ((pixels, expected_pixels), (grad, expected_grad)):
        tolerance = TOLERANCE[value.dtype]
        torch.testing.assert_close(value.double(), oracle, rtol=tolerance, atol=tolerance * float(oracle.abs().max()))
    assert grad.stride() == torch.empty_like(images).stride()
    channels_last = images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()
    assert pixels.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


@pytest.mark.parametrize("dtype", DTYPES)
def test_formula_in_any_layout(
    layout: Callable[[Tensor], Tensor], dtype: torch.dtype, triton_backend: torch.device
) -> None:
    assert_agrees(layout(torch.randn(1, 3, 23, 17).to(triton_backend, dtype)), 8)


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
@pytest.mark.parametrize("filter", ["bicubic", "bilinear"])
@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("memory_format", FORMATS)
def test_every_option(
    fit: str, filter: str, antialias: bool, memory_format: torch.memory_format, triton_backend: torch.device
) -> None:
    clamp = {"crop": "hard", "pad": "straight_through", "stretch": "none"}[fit]
    for shape, size in (((1, 2, 13, 29), 7), ((1, 2, 31, 11), 8)):
        images = torch.randn(shape).to(triton_backend).contiguous(memory_format=memory_format)
        assert_agrees(images, size, fit=fit, filter=filter, antialias=antialias, clamp=clamp)


@pytest.mark.parametrize("shape", [(2, 1, 5, 300), (1, 2, 300, 5), (1, 2, 6, 5)])
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
def test_several_tiles(
    shape: tuple[int, ...], memory_format: torch.memory_format, fit: str, triton_backend: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(kernels, "ROWS_TILE", (64, 32))
    monkeypatch.setattr(kernels, "COLUMNS_TILE", (32, 32))
    images = torch.randn(shape).to(triton_backend).contiguous(memory_format=memory_format)
    assert_agrees(images, 35 if shape[2:] == (6, 5) else 4, fit=fit, antialias=max(shape) < 300)


@pytest.mark.parametrize("clamp", ["hard", "straight_through", "none"])
def test_clamps(clamp: str, triton_backend: torch.device) -> None:
    row = torch.tensor([-1.5, -1.0, 0.0, 1.0, 1.5])
    images = row.expand(1, 1, 5, 5).to(triton_backend)
    options = {"mean": [0.0], "std": [1.0], "clamp": clamp}
    pixels, grad = both_ways(images, torch.ones_like(images), 5, **options)
    expected = (row + 1) / 2 if clamp == "none" else ((row + 1) / 2).clamp(0, 1)
    torch.testing.assert_close(pixels.cpu(), expected.expand(1, 1, 5, 5))
    inside = row.abs() <= 1.0 if clamp == "hard" else torch.ones(5, dtype=torch.bool)
    torch.testing.assert_close(grad.cpu(), (0.5 * inside).expand(1, 1, 5, 5))


@pytest.mark.parametrize("memory_format", FORMATS)
def test_output_of_another_dtype(memory_format: torch.memory_format, triton_backend: torch.device) -> None:
    images = torch.randn(1, 3, 12, 15).to(triton_backend).contiguous(memory_format=memory_format)
    assert_agrees(images, 6, torch.float16)
    assert_agrees(images.half(), 6, torch.float32)
    assert_agrees(images, 6, torch.float64)


@pytest.mark.parametrize(
    "options", [{}, {"antialias": False}, {"fit": "pad"}, {"filter": "bilinear", "fit": "stretch"}]
)
def test_adjoint_identity(options: dict[str, Any], triton_backend: torch.device) -> None:
    x = torch.randn(1, 1, 19, 27).to(triton_backend)
    y = torch.randn(1, 1, 9, 9).to(triton_backend)
    image, adjoint = both_ways(x, y, 9, clamp="none", **UNIT, **options)
    left, right = ((a.double() * b.double()).sum() for a, b in ((image, y), (x, adjoint)))
    assert abs(left - right) < 1e-6 * image.double().norm() * y.double().norm()


def test_borders(triton_backend: torch.device) -> None:
    """Pixels that are cropped away are not read and get no gradient; padded ones are black."""
    images = torch.zeros(1, 1, 8, 64, device=triton_backend)
    images[..., :24] = images[..., 40:] = torch.nan
    pixels, grad = both_ways(images, torch.ones(1, 1, 8, 8, device=triton_backend), 8, clamp="none", fit="crop")
    assert not pixels.isnan().any()
    assert (grad[..., :28] == 0.0).all() and (grad[..., 36:] == 0.0).all() and (grad[..., 28:36] != 0.0).all()
    white = torch.ones(1, 3, 4, 8, device=triton_backend)
    pixels, _ = both_ways(white, torch.ones(1, 3, 8, 8, device=triton_backend), 8, fit="pad")
    black = -torch.tensor(MEAN) / torch.tensor(STD)
    for row in (0, 1, 6, 7):
        torch.testing.assert_close(pixels[0, :, row].cpu(), black[:, None].expand(3, 8))
    assert (pixels[0, :, 2:6] > 0).all()


def test_nan_stays_where_the_filter_reaches(triton_backend: torch.device) -> None:
    images = torch.zeros(1, 1, 32, 32, device=triton_backend)
    images[0, 0, 16, 16] = torch.nan
    for clamp in ("hard", "none"):
        pixels, grad = both_ways(images, torch.ones(1, 1, 8, 8, device=triton_backend), 8, clamp=clamp)
        assert pixels[0, 0, 2:6, 2:6].isnan().all() and pixels.isnan().sum() == 16
        assert not grad.isnan().any()
        assert (grad[0, 0, 16, 16] == 0.0) == (clamp == "hard")


def test_size_kept_is_exact(triton_backend: torch.device) -> None:
    images = torch.rand(1, 1, 21, 21).to(triton_backend)
    for filter in ("bicubic", "bilinear"):
        for antialias in (False, True):
            pixels, _ = both_ways(images, images, 21, filter=filter, antialias=antialias, **UNIT)
            assert torch.equal(pixels, images)


def test_empty_batch_and_unwritten_inputs(triton_backend: torch.device) -> None:
    outer = torch.empty(0, 3, 4, 4, device=triton_backend)
    pixels, grad = both_ways(torch.empty(0, 3, 8, 8, device=triton_backend), outer, 4)
    assert pixels.shape == (0, 3, 4, 4) and grad.shape == (0, 3, 8, 8)
    images, outer = torch.randn(1, 1, 9, 8).to(triton_backend), torch.randn(1, 1, 5, 5).to(triton_backend)
    copies = images.clone(), outer.clone()
    first, second = both_ways(images, outer, 5), both_ways(images, outer, 5)
    assert torch.equal(images, copies[0]) and torch.equal(outer, copies[1])
    assert all(torch.equal(value, again) for value, again in zip(first, second, strict=True))


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
@pytest.mark.parametrize("sizes", [(64, 96, 28), (96, 64, 28), (11, 3, 40), (7, 7, 7), (1, 50, 4), (50, 1, 4)])
def test_tables_are_the_matrix_and_its_transpose(fit: str, sizes: tuple[int, int, int]) -> None:
    for filter in ("bicubic", "bilinear"):
        for antialias in (False, True):
            arguments = *sizes, fit, filter, antialias
            matrix = axis_matrix(*arguments)
            for axis, expected in zip(
                kernels._tables(torch.device("cpu"), *arguments), (matrix, matrix.T), strict=True
            ):
                dense = torch.zeros(expected.shape)
                for o, (first, count) in enumerate(zip(axis.first.tolist(), axis.counts.tolist(), strict=True)):
                    dense[o, first : first + count] = axis.weights[:count, o]
                assert torch.equal(dense, expected.float())
                used = expected.any(dim=0).nonzero()
                assert (axis.begin, axis.end) == (int(used.min()), int(used.max()) + 1)
