"""The formulas and tiles of noise in Triton, in the interpreter where there is no GPU."""

import math
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from diffpp_fast import Noise, ops, use_backend
from diffpp_fast.ops.triton.random import box_muller

N = 1 << 16


@triton.jit
def pairs(p_words: Any, p_normals: Any, N: tl.constexpr) -> None:
    b = tl.arange(0, N)
    first, second = box_muller(tl.load(p_words + b).to(tl.uint32), tl.load(p_words + N + b).to(tl.uint32))
    tl.store(p_normals + b, first)
    tl.store(p_normals + N + b, second)


def hard_words() -> Tensor:
    """Words [2, N]: all sizes, next to the powers of two, and where logarithm, sine and cosine have their zeros."""
    even = torch.arange(N // 2, dtype=torch.int64) * (2**32 // (N // 2)) + 12345
    near = torch.arange(N // 32) - N // 64
    rest = [(point + near) % 2**32 for point in (0, 2**32 - 1, 2**30, 2**31, 3 * 2**30, 2**24, 2**29, int(0.6 * 2**32))]
    words = torch.cat([even, *rest, torch.randint(2**32, (N // 4,))])
    return torch.stack([words, words[torch.randperm(N)]])


def test_normals_are_within_the_documented_distance(triton_backend: torch.device) -> None:
    words = hard_words()
    normals = torch.empty(2, N, device=triton_backend)
    pairs[(1,)](words.to(triton_backend), normals, N)
    a, b = words.to(torch.float32)
    # Float32 where rounding decides which number is drawn, float64 after.
    u1, u2 = (a * 2.0**-32 + 2.0**-33).double(), b.double() * 2.0**-32
    radius = (-2.0 * u1.log()).sqrt()
    expected = torch.stack([radius * (2 * math.pi * u2).cos(), radius * (2 * math.pi * u2).sin()])
    off = (normals.cpu().double() - expected).abs() / expected.abs().clamp(min=1.0) * 2.0**24
    assert normals.isfinite().all() and off.max() < 6.0
    assert (normals.cpu()[:, u1 == 1.0] == 0.0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(2, 6, 8), (4, 6, 90), (8, 4, 5), (32, 4, 33), (512, 2, 4), (3, 4, 5), (1024, 2, 2)])
def test_channels_last_holds_the_same_noise(
    shape: tuple[int, ...], dtype: torch.dtype, triton_backend: torch.device
) -> None:
    """In tiles of neighbouring pixels, of four channels, and of neither."""
    noise = Noise(3, torch.tensor([5, -1], device=triton_backend))
    zeros = torch.zeros(2, *shape, dtype=dtype, device=triton_backend)
    none, one = zeros.new_zeros(2), zeros.new_ones(2)
    drawn = ops.add_noise(zeros.contiguous(memory_format=torch.channels_last), none, one, noise)
    assert torch.equal(drawn, noise.normal(shape, dtype))


def test_more_blocks_than_an_axis_of_the_grid_has(
    monkeypatch: pytest.MonkeyPatch, triton_backend: torch.device
) -> None:
    from diffpp_fast.ops.triton import layout, philox

    for module in (layout, philox):
        monkeypatch.setattr(module, "MOST_PROGRAMS", 2)
    monkeypatch.setattr(layout, "_MOST_PROGRAMS", type(layout._MOST_PROGRAMS)(2))
    noise = Noise(3, torch.tensor([5, -1], device=triton_backend))
    drawn = noise.normal((5 * philox.BLOCK - 7,))
    with use_backend("reference"):
        torch.testing.assert_close(drawn, noise.normal((5 * philox.BLOCK - 7,)), atol=3e-6, rtol=1e-6)


def test_large_samples_hold_the_same_numbers(monkeypatch: pytest.MonkeyPatch, triton_backend: torch.device) -> None:
    """A program of larger blocks draws what two of smaller ones do."""
    from diffpp_fast.ops.triton import philox

    noise = Noise(3, torch.tensor([5, -1], device=triton_backend))
    shape = (4 * philox.BLOCK - 7,)
    expected = noise.normal(shape)
    monkeypatch.setattr(philox, "LARGE", 1)
    assert torch.equal(noise.normal(shape), expected)
