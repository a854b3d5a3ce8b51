"""x_t = alpha x0 + sigma eps, against the formula in float64."""

from collections.abc import Callable

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from diffpp_fast import Noise, ops

pytestmark = pytest.mark.usefixtures("backend")

F64 = torch.float64


def formula(x0: Tensor, alpha: Tensor, sigma: Tensor, eps: Tensor) -> Tensor:
    shape = (-1, *[1] * (x0.dim() - 1))
    return alpha.reshape(shape) * x0 + sigma.reshape(shape) * eps


def arguments(*shape: int, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x0, eps = torch.randn(2, *shape, dtype=dtype)
    alpha, sigma = torch.rand(2, shape[0], dtype=F64 if dtype == F64 else torch.float32)
    return x0, alpha, sigma, eps


@given(shape=st.lists(st.integers(0, 5), min_size=1, max_size=5))
def test_formula(shape: list[int]) -> None:
    args = arguments(*shape)
    torch.testing.assert_close(ops.add_noise(*args), formula(*args))


def test_noise_is_drawn_from_its_address() -> None:
    x0, alpha, sigma, _ = arguments(3, 4, 5, 7, dtype=torch.float32)
    noise = Noise(7, torch.tensor([3, 2**40, 11]))
    eps = noise.normal((4, 5, 7))
    assert torch.equal(ops.add_noise(x0, alpha, sigma, noise), ops.add_noise(x0, alpha, sigma, eps))
    torch.testing.assert_close(ops.add_noise(x0, alpha, sigma, noise), formula(x0, alpha, sigma, eps))


def test_gradient() -> None:
    x0, alpha, sigma, eps = arguments(3, 2, 5)
    torch.autograd.gradcheck(lambda x: ops.add_noise(x, alpha, sigma, eps), (x0.requires_grad_(),))


def test_adjoint_identity() -> None:
    x0, alpha, sigma, _ = arguments(3, 2, 5)
    y = torch.randn_like(x0)
    x0.requires_grad_()
    linear = ops.add_noise(x0, alpha, sigma, torch.zeros_like(y))
    (adjoint,) = torch.autograd.grad(linear, x0, y)
    torch.testing.assert_close((linear * y).sum(), (x0 * adjoint).sum())


def test_a_learned_schedule_gets_its_gradient() -> None:
    x0, alpha, sigma, eps = (argument.requires_grad_() for argument in arguments(2, 3))
    ops.add_noise(x0, alpha, sigma, eps).sum().backward()
    torch.testing.assert_close(alpha.grad, x0.detach().sum(1))
    torch.testing.assert_close(sigma.grad, eps.detach().sum(1))
    torch.testing.assert_close(x0.grad, alpha.detach()[:, None].expand_as(x0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype, assert_twice_unfused: Callable[..., None]) -> None:
    x0, alpha, sigma, eps = arguments(4, 4, 16, 16, dtype=dtype)
    oracle = formula(x0.double(), alpha.double(), sigma.double(), eps.double())
    unfused = formula(x0, alpha.to(dtype), sigma.to(dtype), eps)
    assert_twice_unfused(ops.add_noise(x0, alpha, sigma, eps), unfused, oracle)


def test_layouts(layout: Callable[[Tensor], Tensor]) -> None:
    x0, alpha, sigma, eps = arguments(2, 4, 5, 7, dtype=torch.float32)
    noise = Noise(1, torch.arange(2))
    laid_out = layout(x0).requires_grad_()
    for eps_or_noise in (eps, layout(eps), noise):
        expected = ops.add_noise(x0, alpha, sigma, noise if eps_or_noise is noise else eps)
        x_t = ops.add_noise(laid_out, alpha, sigma, eps_or_noise)
        assert torch.equal(x_t, expected)
        assert x_t.stride() == torch.empty_like(laid_out).stride()
    x_t.backward(layout(torch.ones_like(x0)))
    torch.testing.assert_close(laid_out.grad, alpha.reshape(2, 1, 1, 1).expand_as(x0))


def test_expanded_input() -> None:
    x0, alpha, sigma, eps = arguments(1, 4, 5, dtype=torch.float32)
    expanded = x0.expand(3, 4, 5)
    actual = ops.add_noise(expanded, alpha.expand(3), sigma.expand(3), eps.expand(3, 4, 5))
    assert torch.equal(actual, ops.add_noise(x0, alpha, sigma, eps).expand(3, 4, 5))


def test_mixed_dtypes_lose_nothing() -> None:
    x0, alpha, sigma, eps = arguments(2, 4, 9, dtype=torch.float32)
    low = x0.bfloat16().requires_grad_()
    x_t = ops.add_noise(low, alpha, sigma, eps)
    assert torch.equal(x_t, ops.add_noise(low.float(), alpha, sigma, eps).bfloat16())
    x_t.sum().backward()
    assert low.grad.dtype == torch.bfloat16


def test_inputs_are_not_written() -> None:
    args = arguments(2, 3)
    copies = [argument.clone() for argument in args]
    ops.add_noise(*args)
    assert all(torch.equal(argument, copy) for argument, copy in zip(args, copies, strict=True))


def test_errors_name_what_is_wrong() -> None:
    x0, alpha, sigma, eps = arguments(2, 3)
    with pytest.raises(TypeError, match=r"add_noise: x0 must be float32, .* got torch\.int64"):
        ops.add_noise(x0.long(), alpha, sigma, eps)
    with pytest.raises(ValueError, match=r"add_noise: alpha must have shape \[B\] = \[2\], got \[2, 1\]"):
        ops.add_noise(x0, alpha[:, None], sigma, eps)
    with pytest.raises(ValueError, match=r"add_noise: noise has shape \[2, 2\], x0 has \[2, 3\]"):
        ops.add_noise(x0, alpha, sigma, eps[:, :2])
    with pytest.raises(ValueError, match="add_noise: noise has 5 samples, the batch has 2"):
        ops.add_noise(x0, alpha, sigma, Noise(0, torch.arange(5)))
    with pytest.raises(TypeError, match="add_noise: noise must be a Noise or a tensor, got int"):
        ops.add_noise(x0, alpha, sigma, 3)
    with pytest.raises(ValueError, match=r"add_noise: sigma is on meta, the tensors before it on (cpu|cuda)"):
        ops.add_noise(x0, alpha, sigma.to("meta"), eps)
    with pytest.raises(ValueError, match=r"add_noise: x0 must have shape \[B, ...\], got a scalar"):
        ops.add_noise(x0[0, 0], alpha, sigma, eps)
