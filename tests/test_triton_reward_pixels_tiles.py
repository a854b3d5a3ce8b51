"""The resize by matrix products of images of 16 bits, in the interpreter where there is no GPU."""

from typing import Any

import pytest
import torch
from test_triton_reward_pixels import FORMATS, both_ways
from torch import Tensor

from diffpp_fast import use_backend
from diffpp_fast.ops.reward_pixels import axis_matrix
from diffpp_fast.ops.triton import reward_pixels as kernels
from diffpp_fast.ops.triton import reward_pixels_tiles as tiles

DTYPES = (torch.float16, torch.bfloat16)
#: Of the norm: what rounding the result takes, and a tenth. The interpreter truncates to bfloat16, which is twice that.
ERROR = {torch.float16: 2.3e-4, torch.bfloat16: 4e-3}


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    names: list[str] = []
    for name in ("shrink", "spread"):
        real = getattr(kernels._ResizeCall, name)

        def call(self: Any, *arguments: Any, real: Any = real, name: str = name) -> None:
            names.append(name)
            real(self, *arguments)

        monkeypatch.setattr(kernels._ResizeCall, name, call)
    return names


def drawn(shape: tuple[int, ...], size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    return tuple(torch.randn(s).to(device, dtype) for s in (shape, (*shape[:2], size, size)))  # type: ignore[return-value]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize(
    ("shape", "size", "options"),
    [
        ((1, 3, 200, 300), 56, {"fit": "crop"}),
        ((1, 2, 64, 96), 33, {"fit": "pad"}),
        ((2, 1, 20, 40), 50, {"fit": "stretch", "clamp": "straight_through", "filter": "bilinear"}),
        ((1, 3, 23, 17), 8, {"antialias": False, "value_range": (0.0, 2.0)}),
    ],
)
def test_error_is_that_of_rounding(
    shape: tuple[int, ...], size: int, options: dict[str, Any], memory_format: torch.memory_format, dtype: torch.dtype,
    triton_backend: torch.device, launched: list[str],
) -> None:  # fmt: skip
    images, outer = drawn(shape, size, dtype, triton_backend)
    results = both_ways(images.contiguous(memory_format=memory_format), outer, size, **options)
    assert launched == ["shrink", "spread"]
    with use_backend("reference"):
        oracle = both_ways(images.double(), outer.double(), size, **options)
    for value, expected in zip(results, oracle, strict=True):
        assert (value.double() - expected).norm() <= ERROR[dtype] * expected.norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory_format", FORMATS)
def test_what_is_not_finite_stays_where_the_filter_reaches(
    dtype: torch.dtype, memory_format: torch.memory_format, triton_backend: torch.device, launched: list[str]
) -> None:
    images, outer = drawn((1, 2, 32, 32), 8, dtype, triton_backend)
    images = images.contiguous(memory_format=memory_format)
    clean = both_ways(images, outer, 8)
    broken, spoiled = images.clone(), outer.clone()
    broken[0, 1, 16, 16] = torch.nan
    spoiled[0, 1, 2, 4] = torch.inf
    pixels, grad = both_ways(broken, spoiled, 8)
    assert launched == ["shrink", "spread"] * 2
    outside = torch.ones(2, 8, 8, dtype=torch.bool)
    outside[1, 2:6, 2:6] = False
    assert torch.equal(pixels[0].isnan().cpu(), ~outside)
    torch.testing.assert_close(pixels[0].cpu()[outside], clean[0][0].cpu()[outside], rtol=2e-2, atol=2e-2)
    assert grad[0, 1, 16, 16] == 0.0
    # Rows 2 to 17 and columns 10 to 25 of the images: what output pixel (2, 4) reads.
    reached = torch.zeros(2, 32, 32, dtype=torch.bool)
    reached[1, 2:18, 10:26] = True
    reached &= (images[0].abs() <= 1.0).cpu()
    reached[1, 16, 16] = False
    assert torch.equal(~grad[0].isfinite().cpu(), reached)


@pytest.mark.parametrize("options", [{"clamp": "none"}, {"value_range": (0.1, 1.0)}, {"dtype": torch.float32}])
def test_what_products_do_not_serve_is_gathered(
    options: dict[str, Any], triton_backend: torch.device, launched: list[str]
) -> None:
    images, outer = drawn((1, 3, 16, 16), 8, torch.float16, triton_backend)
    both_ways(images, outer.to(options.get("dtype", outer.dtype)), 8, **options)
    assert "shrink" not in launched
    assert ("spread" in launched) == ("dtype" not in options)


@pytest.mark.parametrize("sizes", [(64, 96, 28), (96, 64, 28), (11, 3, 40), (7, 7, 7), (1, 50, 4), (1000, 1000, 224)])
@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
def test_tiles_are_the_matrix(sizes: tuple[int, int, int], fit: str) -> None:
    matrix = axis_matrix(*sizes, fit, "bicubic", True)
    for given, shape in ((matrix, tiles.ROWS), (matrix, tiles.COLUMNS), (matrix.T, tiles.ADJOINT_ROWS)):
        cut = tiles.tiles_of(given, shape, shape is tiles.COLUMNS)
        assert cut is not None and cut.size <= cut.padded <= shape.most
        assert (cut.number - 1) * cut.size < len(given) <= cut.number * cut.size
        whole = torch.zeros(cut.number * cut.size, given.shape[1] + cut.window, dtype=torch.float64)
        for tile, start in enumerate(cut.start.tolist()):
            begin = start * cut.unit
            assert not cut.whole or begin + cut.window <= given.shape[1]
            whole[tile * cut.size : (tile + 1) * cut.size, begin : begin + cut.window] = cut.weights[tile, : cut.size]
        assert torch.equal(whole[: len(given), : given.shape[1]], given)
        assert not whole[len(given) :].any() and not whole[:, given.shape[1] :].any()


def test_no_tiles_where_a_window_holds_few_outputs() -> None:
    assert tiles.tiles_of(axis_matrix(4096, 4096, 56, "crop", "bicubic", True), tiles.ROWS, False) is None


def test_tiles_leave_room_for_what_they_hold() -> None:
    def padded(dtype: torch.dtype, adjoint: bool, side: int, size: int) -> int:
        options = (side, side, size, "crop", "bicubic", True, ())
        cut = tiles.tiled(torch.device("cpu"), dtype, 1, adjoint, *options)
        assert cut is not None
        return cut.rows.padded

    assert [padded(dtype, False, 512, 224) for dtype in DTYPES] == [16, 32]
    # Columns of gradients: windows of 64 and of 128.
    assert [padded(torch.bfloat16, True, 512, size) for size in (224, 384)] == [128, 64]


@pytest.mark.parametrize("dtype", DTYPES)
def test_which_ends_of_a_range_are_exact(dtype: torch.dtype) -> None:
    for number in (0.0, 1.0, -1.0, 255.0, 257.0, 0.1, 2049.0, 1e5, 1e-9, 1.0078125, 1.00390625):
        value = torch.tensor(number, dtype=torch.float64)
        assert tiles.exact(number, dtype) == (value.to(dtype).double() == value).item()
