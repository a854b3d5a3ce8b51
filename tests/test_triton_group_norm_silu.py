"""The Triton kernels of group_norm_silu, in the interpreter where there is no GPU."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from diffpp_fast import ops, use_backend
from diffpp_fast.ops.triton import group_norm_silu as kernels

# The interpreter truncates casts to bfloat16 instead of rounding them.
DTYPES = (
    (torch.float32, torch.float16) if not torch.cuda.is_available() else (torch.float32, torch.float16, torch.bfloat16)
)
TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Cuts small tensors as large ones are: several channels, tiles of channels, tiles and chunks of pixels."""
    for name, value in (
        ("MOST_IN_ONE", 16),
        ("TILE", 128),
        ("TILE_CHANNELS", 8),
        ("MOST_PARTIALS", 8),
        ("SHORTEST", 8),
    ):
        monkeypatch.setattr(kernels, name, value)
    return monkeypatch


def with_gradients(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, activation: str = "silu", eps: float = 1e-5
) -> list[Tensor]:
    """y, then the gradients of x, weight and bias for an upstream gradient that depends on the shape alone."""
    leaves = [None if value is None else value.detach().requires_grad_() for value in (x, weight, bias)]
    y = ops.group_norm_silu(leaves[0], groups, leaves[1], leaves[2], eps, activation)
    outer = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(y)
    return [y.detach(), *torch.autograd.grad(y, [leaf for leaf in leaves if leaf is not None], outer)]


def assert_agrees(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, activation: str = "silu", eps: float = 1e-5
) -> None:
    actual = with_gradients(x, groups, weight, bias, activation, eps)
    with use_backend("reference"):
        wide = [None if value is None else value.double() for value in (x, weight, bias)]
        oracles = with_gradients(wide[0], groups, wide[1], wide[2], activation, eps)
    leaves = [x, *(value for value in (x, weight, bias) if value is not None)]
    for value, oracle, like in zip(actual, oracles, leaves, strict=True):
        assert value.dtype == like.dtype
        # Upstream gradients and inputs are those of x's dtype, and so are the sums' errors.
        tolerance = max(TOLERANCE[x.dtype], TOLERANCE.get(like.dtype, 0.0))
        torch.testing.assert_close(value.double(), oracle, rtol=tolerance, atol=tolerance * float(oracle.abs().max()))
    for value in actual[:2]:
        assert value.stride() == torch.empty_like(x).stride()


def assert_agrees_on_what_is_added(x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None) -> None:
    """The sum with a residual and its norm, then offsets, with every gradient."""
    generator = torch.Generator().manual_seed(2)
    residual, outer = (torch.randn(x.shape, generator=generator).to(x) for _ in range(2))
    offset = torch.randn(x.shape[1::-1], generator=generator).to(x).T
    results = []
    for dtype, backend in ((x.dtype, "triton"), (torch.float64, "reference")):
        with use_backend(backend):
            given = (x, residual, offset, weight, bias)
            leaves: list[Any] = [
                None if value is None else value.detach().to(dtype).requires_grad_() for value in given
            ]
            y, total = ops.group_norm_silu(leaves[0], groups, *leaves[3:], residual=leaves[1])
            affine = [leaf for leaf in leaves[3:] if leaf is not None]
            grads = torch.autograd.grad(
                (y, total), (*leaves[:2], *affine), (outer.to(dtype), residual.to(dtype)), retain_graph=True
            )
            alone = torch.autograd.grad(y, leaves[:2], outer.to(dtype))
            moved = ops.group_norm_silu(leaves[0], groups, *leaves[3:], offset=leaves[2])
            more = torch.autograd.grad(moved, (leaves[0], leaves[2], *affine), outer.to(dtype))
            results.append((y, total, *grads, *alone, moved, *more))
    tolerance = TOLERANCE[x.dtype]
    for value, oracle in zip(*results, strict=True):
        torch.testing.assert_close(value.double(), oracle, rtol=tolerance, atol=tolerance * float(oracle.abs().max()))
    for value in (*results[0][:2], *results[0][2:4]):
        assert value.stride() == torch.empty_like(x).stride()


def parameters(channels: int, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    weight, bias = torch.randn(2, channels).to(device, dtype)
    return weight, bias


@pytest.mark.parametrize("dtype", DTYPES)
def test_formula_in_any_layout(
    layout: Callable[[Tensor], Tensor], dtype: torch.dtype, triton_backend: torch.device
) -> None:
    x = torch.randn(2, 6, 5, 7).to(triton_backend, dtype)
    assert_agrees(layout(x), 2, *parameters(6, triton_backend, dtype))
    assert_agrees_on_what_is_added(layout(x), 2, None, None)


@pytest.mark.parametrize("shape", [(2, 6), (2, 6, 1), (1, 10, 13), (1, 6, 2, 3, 5)])
@pytest.mark.parametrize("activation", ["silu", "identity"])
def test_dimensions(shape: tuple[int, ...], activation: str, triton_backend: torch.device) -> None:
    x = torch.randn(shape, device=triton_backend)
    assert_agrees(x, 2, *parameters(shape[1], triton_backend), activation, 1e-2)
    if x.dim() in CHANNELS_LAST:
        x = x.contiguous(memory_format=CHANNELS_LAST[x.dim()])
        assert_agrees(x, 2, *parameters(shape[1], triton_backend), activation, 1e-2)


# Tiles that end where the tensor does, which are not masked, and others.
@pytest.mark.parametrize(("shape", "programs"), [((1, 8, 4, 16), 2), ((1, 6, 3, 11), 1000)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_what_is_added(
    shape: tuple[int, ...],
    programs: int,
    channels_last: bool,
    triton_backend: torch.device,
    small_tiles: pytest.MonkeyPatch,
) -> None:
    small_tiles.setattr(kernels, "PROGRAMS", programs)
    x = torch.randn(shape).to(triton_backend)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    assert kernels.cut(x, 2, kernels.Order(x)).full == (shape[1] == 8)
    assert_agrees_on_what_is_added(x, 2, *parameters(shape[1], triton_backend))


def test_offsets_far_from_the_values_around_a_large_mean(
    triton_backend: torch.device, small_tiles: pytest.MonkeyPatch
) -> None:
    x = 3e4 + torch.randn(1, 4, 8, 8).to(triton_backend)
    offset = 2e4 * torch.randn(1, 4).to(triton_backend)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        _, mean, rstd = kernels.forward(x.contiguous(memory_format=memory_format), 2, None, None, 0.0, True, offset)
        moved = (x.double() + offset.double()[:, :, None, None]).reshape(1, 2, -1)
        variance, expected = torch.var_mean(moved, dim=2, correction=0)
        torch.testing.assert_close(mean, expected.float(), rtol=3e-7, atol=3e-3)
        torch.testing.assert_close(rstd, variance.rsqrt().float(), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("size", [1, 5, 6, 10, 40, 4096, 65535])
def test_the_group_of_a_channel(size: int, triton_backend: torch.device) -> None:
    """The multiplication that stands for a division, up to the largest channel that it serves."""
    inverse = 0xFFFFFFFF // size
    for channel in {*range(0, 65536, 97), *range(65536 // size * size - 2, 65536), 65535, size - 1, size}:
        if 0 <= channel <= kernels.MOST_CHANNELS:
            assert (channel + 1) * inverse >> 32 == channel // size


# Row-major, a tile is one channel of the first two shapes, of the others several of a group's. A program takes one tile
# of pixels, some, or all; no size is a multiple of a tile's.
@pytest.mark.parametrize(
    ("shape", "groups", "programs"),
    [
        ((1, 4, 17, 31), 2, 8),
        ((1, 2, 17, 31), 2, 1),
        ((1, 3, 17, 19), 1, 1000),
        ((2, 20, 3, 5), 2, 1000),
        ((1, 33, 7), 1, 1000),
        ((1, 10, 1, 61, 1), 2, 1000),
    ],
)
@pytest.mark.parametrize("channels_last", [False, True])
def test_groups_of_several_tiles(
    shape: tuple[int, ...],
    groups: int,
    programs: int,
    channels_last: bool,
    triton_backend: torch.device,
    small_tiles: pytest.MonkeyPatch,
) -> None:
    small_tiles.setattr(kernels, "PROGRAMS", programs)
    x = torch.randn(shape, device=triton_backend)
    if channels_last:
        if x.dim() not in CHANNELS_LAST:
            pytest.skip("channels_last has four or five dimensions")
        x = x.contiguous(memory_format=CHANNELS_LAST[x.dim()])
    assert not kernels.cut(x, groups, kernels.Order(x)).is_one_group
    assert_agrees(x, groups, *parameters(shape[1], triton_backend))


def test_how_large_tensors_are_cut() -> None:
    """Every channel and pixel once, enough programs, and few partial results for each group of row-major tensors."""
    for shape in ((1, 128, 512, 512), (1, 512, 64, 64), (8, 320, 64, 64), (1, 128, 1024, 1024), (2, 30, 997, 1009)):
        for memory_format in (torch.contiguous_format, torch.channels_last):
            x = torch.empty(shape, device="meta").contiguous(memory_format=memory_format)
            how = kernels.cut(x, 10 if shape[1] == 30 else 32, kernels.Order(x))
            assert how.chunk * (how.chunks - 1) < how.pixels <= how.chunk * how.chunks
            assert how.block_c * (how.tiles - 1) < how.span <= how.block_c * how.tiles
            tile = kernels.TILE // 2 if shape[1] == 30 else kernels.TILE  # whole loads of 16 bytes, or single elements
            assert how.chunk % how.block_p == 0 and how.block_c * how.block_p == tile
            programs = how.grid[0] * how.grid[1]
            tiles = programs * how.chunk // how.block_p
            assert min(tiles, kernels.PROGRAMS // 2) <= programs <= 2 * kernels.PROGRAMS
            assert how.full == (shape[1] != 30)
            assert how.span != how.per_group or how.per_group * how.chunks <= kernels.MOST_PARTIALS


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("several", [False, True])
def test_mean_and_deviation_far_apart(
    channels_last: bool, several: bool, triton_backend: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    if several:
        for name, value in (("MOST_IN_ONE", 16), ("TILE", 128), ("PROGRAMS", 8)):
            monkeypatch.setattr(kernels, name, value)
    x = 3e4 + torch.randn(1, 4, 19, 23).to(triton_backend)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    _, mean, rstd = kernels.forward(x, 2, None, None, 0.0, True, None)
    variance, expected = torch.var_mean(x.double().reshape(1, 2, -1), dim=2, correction=0)
    torch.testing.assert_close(mean, expected.float(), rtol=1.2e-7, atol=0.0)
    torch.testing.assert_close(rstd, variance.rsqrt().float(), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("several", [False, True])
def test_parameters_that_are_absent_strided_or_of_other_dtypes(
    several: bool, triton_backend: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    if several:
        monkeypatch.setattr(kernels, "MOST_IN_ONE", 8)
    x = torch.randn(2, 4, 5, device=triton_backend)
    weight = torch.randn(8, dtype=torch.float64, device=triton_backend)[::2]
    bias = torch.randn(4, device=triton_backend).half()
    assert_agrees(x, 2, weight, bias)
    assert_agrees(x, 2, weight, None)
    assert_agrees(x.half(), 2, None, bias.float())
    assert_agrees(x, 2, None, None)


@pytest.mark.parametrize("several", [False, True])
def test_each_gradient_only_where_needed(
    several: bool, triton_backend: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    if several:
        monkeypatch.setattr(kernels, "MOST_IN_ONE", 8)
    x, grad = torch.randn(2, 2, 4, 5, device=triton_backend)
    weight, bias = parameters(4, triton_backend)
    _, mean, rstd = kernels.forward(x, 2, weight, bias, 1e-5, True, None)
    every = kernels.backward(grad, None, x, mean, rstd, weight, bias, None, True, True, True, True)
    for needs in ((True, False, False), (False, True, False), (False, False, True), (False, False, False)):
        grads = kernels.backward(grad, None, x, mean, rstd, weight, bias, None, True, *needs)
        for value, expected, needed in zip(grads, every, needs, strict=True):
            # The same bits: nothing depends on the order in which programs run.
            assert torch.equal(value, expected) if needed else value is None
    assert kernels.backward(grad, None, x, mean, rstd, None, None, None, True, False, True, True) == (None, None, None)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("channels_last", [False, True])
def test_what_is_not_finite_stays_in_its_group(
    value: float, channels_last: bool, triton_backend: torch.device, small_tiles: pytest.MonkeyPatch
) -> None:
    x = torch.randn(2, 4, 5, 7, device=triton_backend)
    x[1, 2, 3, 4] = value
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    y, grad, *_ = with_gradients(x, 2, *parameters(4, triton_backend))
    for result in (y, grad):
        assert result[1, 2:].isnan().all() and result.isnan().sum() == 2 * 5 * 7


def test_silu_at_every_magnitude(triton_backend: torch.device) -> None:
    ends = torch.tensor([0.0, 1e-40, 87.0, 88.0, 89.0, 1e4, 1e30, 3.4e38])
    y = torch.cat((torch.linspace(-80, 80, 1008), ends, -ends)).to(triton_backend)
    x = torch.randn(1, 1024, 2, device=triton_backend)
    # With weight 0 the output is silu(bias).
    zero = torch.zeros_like(y)
    actual = ops.group_norm_silu(x, 1, zero, y)[0, :, 0]
    torch.testing.assert_close(actual.double(), F.silu(y.double()), rtol=1e-5, atol=1e-35)
    grad = with_gradients(x, 1, zero, y)[-1]
    with use_backend("reference"):
        expected = with_gradients(x.double(), 1, zero.double(), y.double())[-1]
    torch.testing.assert_close(grad.double(), expected, rtol=1e-5, atol=1e-6)


def test_empty_batch_and_expanded_upstream_gradient(triton_backend: torch.device) -> None:
    weight, bias = parameters(4, triton_backend)
    y, grad_x, grad_weight, grad_bias = with_gradients(torch.empty(0, 4, 3, device=triton_backend), 2, weight, bias)
    assert y.shape == grad_x.shape == (0, 4, 3)
    assert (grad_weight == 0).all() and (grad_bias == 0).all()
    x = torch.randn(2, 4, 3, device=triton_backend, requires_grad=True)
    y = ops.group_norm_silu(x, 2, weight, bias)
    (grad,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    assert torch.equal(grad, torch.autograd.grad(y, x, torch.ones_like(y))[0])
