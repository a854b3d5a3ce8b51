"""The compiled add_noise and draws: registration, threads, layouts, sizes. The formula is in test_ops_add_noise.py."""

from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from native import assert_compiles_once, assert_same_bits_for_any_threads, check_registration
from torch import Tensor

from diffpp_fast import Noise, ops, philox, use_backend

pytestmark = pytest.mark.usefixtures("cpu_backend")

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Noise]:
    batch = shape[0]
    return torch.randn(shape).to(dtype), torch.rand(batch), torch.rand(batch), Noise(2**64 - 5, torch.arange(batch) - 1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_registration(dtype: torch.dtype, cpu_backend: Any) -> None:
    x0, alpha, sigma, noise = inputs(2, 3, 5, 7, dtype=dtype)
    check_registration(cpu_backend.add_noise.default, x0, alpha, sigma, noise.samples, -5, 1)
    check_registration(cpu_backend.add_noise.default, x0, alpha, sigma, torch.randn_like(x0), 0, 0)
    check_registration(cpu_backend.add_noise_backward.default, x0, alpha)
    check_registration(cpu_backend.normal.default, noise.samples, -5, 1, 35, dtype)
    check_registration(cpu_backend.uniform.default, noise.samples, -5, 1)
    check_registration(cpu_backend.integers.default, noise.samples, -5, 1, -3, 2**32)


def test_same_bits_for_any_threads() -> None:
    x0, alpha, sigma, noise = inputs(3, 5, 61, 67)
    assert_same_bits_for_any_threads(lambda: ops.add_noise(x0, alpha, sigma, noise))
    assert_same_bits_for_any_threads(lambda: noise.normal((5, 61, 67)))


def test_compiles_once() -> None:
    def add(x0: Tensor, alpha: Tensor, sigma: Tensor, samples: Tensor) -> Tensor:
        return ops.add_noise(x0, alpha, sigma, Noise(2**63 + 1, samples))

    batches = []
    for first in (0, 10, 20):
        x0, alpha, sigma, _ = inputs(2, 4, 8, 8)
        batches.append((x0.requires_grad_(), alpha, sigma, torch.arange(first, first + 2)))
    assert_compiles_once(add, *batches)


@given(shape=st.lists(st.integers(0, 67), min_size=0, max_size=3), batch=st.integers(0, 3))
def test_any_size_agrees_with_the_reference(shape: list[int], batch: int) -> None:
    x0, alpha, sigma, noise = inputs(batch, *shape)
    actual = ops.add_noise(x0, alpha, sigma, noise)
    with use_backend("reference"):
        torch.testing.assert_close(actual, ops.add_noise(x0, alpha, sigma, noise), atol=3e-6, rtol=1e-6)


def test_normals_are_as_close_to_float64_as_the_reference() -> None:
    noise = Noise(3, torch.arange(4))
    drawn = noise.normal((50_000,)).double()
    with use_backend("reference"):
        unfused = noise.normal((50_000,)).double()
    # The formula in float64 on the same words: float32 words and their scaling are part of the definition.
    words = philox.blocks(noise.samples, noise.seed_bits, noise.stream, 12_500)
    u1 = (words[..., 0::2].float() * 2.0**-32 + 2.0**-33).double()
    u2 = (words[..., 1::2].float() * 2.0**-32).double()
    radius, angle = (-2.0 * u1.log()).sqrt(), 2.0 * torch.pi * u2
    oracle = torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1).reshape(4, 50_000)
    error = (drawn - oracle).abs()
    assert error.max() <= (unfused - oracle).abs().max()
    assert (error / oracle.abs().clamp(min=1.0)).max() < 4 * 2.0**-24


@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts_hold_the_same_numbers(layout: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    x0, alpha, sigma, noise = inputs(2, 5, 9, 31, dtype=dtype)
    other = layout(x0)
    assert torch.equal(ops.add_noise(x0, alpha, sigma, noise), ops.add_noise(other, alpha, sigma, noise))
    eps = torch.randn_like(x0)
    assert torch.equal(ops.add_noise(x0, alpha, sigma, eps), ops.add_noise(other, alpha, sigma, layout(eps)))


def test_video_in_channels_last() -> None:
    x0, alpha, sigma, noise = inputs(2, 3, 4, 5, 6)
    video = x0.contiguous(memory_format=torch.channels_last_3d)
    x_t = ops.add_noise(video, alpha, sigma, noise)
    assert x_t.is_contiguous(memory_format=torch.channels_last_3d)
    assert torch.equal(x_t, ops.add_noise(x0, alpha, sigma, noise))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 4, 4, 5), (1, 16, 6, 10), (3, 12, 2, 2), (2, 8, 3, 3), (2, 6, 4, 4)])
def test_whole_philox_blocks_in_channels_last(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x0, alpha, sigma, noise = inputs(*shape, dtype=dtype)
    laid_out = x0.contiguous(memory_format=torch.channels_last)
    x_t = ops.add_noise(laid_out, alpha, sigma, noise)
    assert torch.equal(x_t, ops.add_noise(x0, alpha, sigma, noise))
    stored = noise.normal(shape[1:], dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    if dtype in (torch.float32, torch.float64):
        assert torch.equal(x_t, ops.add_noise(laid_out, alpha, sigma, stored))


def test_inputs_are_not_written_and_coefficients_may_be_expanded() -> None:
    x0, _, _, noise = inputs(3, 4, 8, 8)
    before = x0.clone()
    alpha = torch.tensor([0.5]).expand(3)
    assert torch.equal(
        ops.add_noise(x0, alpha, alpha, noise), ops.add_noise(x0, torch.full((3,), 0.5), torch.full((3,), 0.5), noise)
    )
    assert torch.equal(x0, before)


def test_the_binding_itself_refuses_what_it_does_not_serve(cpu_backend: Any) -> None:
    x0, alpha, sigma, noise = inputs(2, 3)
    call = cpu_backend.add_noise.default
    dtypes = "float32, bfloat16, float16 or float64"
    for arguments, message in (
        (
            (x0.int(), alpha, sigma, noise.samples),
            f"add_noise: x0 must be {dtypes}, got Int",
        ),
        ((x0, alpha[:1], sigma, noise.samples), r"add_noise: alpha must have shape \[B\] = \[2\]"),
        ((x0, alpha, sigma, noise.samples[:1]), r"add_noise: samples must have shape \[B\] = \[2\]"),
        ((x0, alpha, sigma, torch.randn(2, 4)), "add_noise: noise must have the shape"),
        ((x0, alpha, sigma, torch.randn(2, 3).double()), "add_noise: noise is Double, the tensors before it are Float"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call(*arguments, 0, 1)
    with pytest.raises(RuntimeError, match=r"integers: range must be in \[1, 2\^32\], got 0"):
        cpu_backend.integers.default(noise.samples, 0, 1, 5, 0)


@pytest.mark.slow
def test_more_than_2_to_the_31_elements() -> None:
    count = 2**31 + 4099
    x0 = torch.zeros(1, count, dtype=torch.bfloat16)
    noise = Noise(7, torch.tensor([3]))
    x_t = ops.add_noise(x0, torch.ones(1), torch.ones(1), noise)
    tail = torch.arange(count - 5000, count)
    from diffpp_fast import philox

    words = torch.stack(
        philox.philox4x32(
            (tail // 4, torch.full_like(tail, 1), torch.full_like(tail, 3), torch.zeros_like(tail)), (7, 0)
        )
    )
    pair = tail % 4 // 2 * 2
    u1 = words.gather(0, pair[None])[0].float() * 2.0**-32 + 2.0**-33
    u2 = words.gather(0, pair[None] + 1)[0].float() * 2.0**-32
    angle = 2.0 * torch.pi * u2
    expected = (-2.0 * u1.log()).sqrt() * torch.where(tail % 2 == 0, angle.cos(), angle.sin())
    torch.testing.assert_close(x_t[0, tail].float(), expected, atol=1e-2, rtol=1e-2)


def test_fakes_beyond_2_to_the_31_elements(cpu_backend: Any) -> None:
    with torch.device("meta"):
        x0 = torch.empty(2, 3, 2**16, 2**15, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
        one = torch.ones(2)
        x_t = cpu_backend.add_noise.default(x0, one, one, torch.empty(2, dtype=torch.int64), 0, 1)
    assert x_t.shape == x0.shape and x_t.stride() == x0.stride() and x_t.dtype == x0.dtype
