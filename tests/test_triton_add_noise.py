"""The Triton kernels of addressed noise and add_noise, in the interpreter where there is no GPU."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from diffpp_fast import Noise, ops, use_backend

# The interpreter truncates casts to bfloat16 instead of rounding them.
DTYPES = (
    (torch.float32, torch.float16) if not torch.cuda.is_available() else (torch.float32, torch.float16, torch.bfloat16)
)
SEED = 2**64 - 5


def inputs(
    device: torch.device, *shape: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Noise]:
    batch = shape[0]
    noise = Noise(SEED, torch.arange(batch, device=device) - 1, 2**31 + 1)
    x0, alpha, sigma = torch.randn(shape), torch.rand(batch), torch.rand(batch)
    return x0.to(device, dtype), alpha.to(device), sigma.to(device), noise


@pytest.mark.parametrize("shape", [(1,), (5,), (3, 7, 5), (4, 16, 17), (0, 3)])
def test_normals_are_those_of_the_reference(shape: tuple[int, ...], triton_backend: torch.device) -> None:
    noise = Noise(SEED, torch.tensor([5, -1, 2**62], device=triton_backend), 7)
    drawn = noise.normal(shape)
    with use_backend("reference"):
        torch.testing.assert_close(drawn, noise.normal(shape), atol=3e-6, rtol=1e-6)


def test_uniforms_and_integers_are_exact(triton_backend: torch.device) -> None:
    noise = Noise(SEED, torch.arange(-70, 70, device=triton_backend), 2**32 - 1)
    ranges = ((0, 1), (-5, 2**31), (-(2**31), 2**31), (2**62, 2**62 + 1000))
    drawn = [noise.uniform(), *(noise.integers(*bounds) for bounds in ranges)]
    with use_backend("reference"):
        expected = [noise.uniform(), *(noise.integers(*bounds) for bounds in ranges)]
    assert all(torch.equal(value, oracle) for value, oracle in zip(drawn, expected, strict=True))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_large_tensors_take_larger_blocks_to_the_same_numbers(
    memory_format: torch.memory_format, triton_backend: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffpp_fast.ops.triton import add_noise

    # Even for blocks of one size, and not of the other.
    x0, alpha, sigma, noise = inputs(triton_backend, 2, 4, 24, 64)
    assert x0[0].numel() % add_noise.BLOCK == 0 != x0[0].numel() % (2 * add_noise.BLOCK)
    leaf = x0.contiguous(memory_format=memory_format).requires_grad_()

    def both() -> tuple[Tensor, ...]:
        x_t = ops.add_noise(leaf, alpha, sigma, noise)
        return x_t, *torch.autograd.grad(x_t, leaf, x0)

    expected = both()
    monkeypatch.setattr(add_noise, "LARGE", 1)
    assert all(torch.equal(*pair) for pair in zip(both(), expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("drawn", [True, False])
def test_formula_in_any_layout(
    layout: Callable[[Tensor], Tensor], dtype: torch.dtype, drawn: bool, triton_backend: torch.device
) -> None:
    x0, alpha, sigma, address = inputs(triton_backend, 2, 3, 9, 31, dtype=dtype)
    noise: Noise | Tensor = address if drawn else layout(torch.randn_like(x0))
    leaf = layout(x0).requires_grad_()
    x_t = ops.add_noise(leaf, alpha, sigma, noise)
    outer = torch.randn_like(x_t)
    (grad,) = torch.autograd.grad(x_t, leaf, outer)
    assert x_t.stride() == torch.empty_like(leaf).stride() and grad.stride() == torch.empty_like(leaf).stride()
    with use_backend("reference"):
        oracle = ops.add_noise(x0.double(), alpha.double(), sigma.double(), noise if drawn else noise.double())
    tolerance = {torch.float32: 3e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(x_t.double(), oracle, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(
        grad.double(), alpha.double().view(-1, 1, 1, 1) * outer.double(), atol=tolerance, rtol=tolerance
    )
