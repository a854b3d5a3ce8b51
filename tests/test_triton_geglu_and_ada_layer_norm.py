"""The Triton kernels of geglu and ada_layer_norm, in the interpreter where there is no GPU."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from diffpp_fast import ops, use_backend
from diffpp_fast.ops.triton import ada_layer_norm as kernels
from diffpp_fast.ops.triton import modulated_norm

# The interpreter truncates casts to bfloat16 instead of rounding them.
DTYPES = (
    (torch.float32, torch.float16) if not torch.cuda.is_available() else (torch.float32, torch.float16, torch.bfloat16)
)
TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def with_gradients(function: Callable[..., Tensor], *args: Tensor) -> list[Tensor]:
    leaves = [value.detach().requires_grad_() for value in args]
    y = function(*leaves)
    outer = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    return [y.detach(), *torch.autograd.grad(y, leaves, outer)]


def assert_agrees(function: Callable[..., Tensor], *args: Tensor) -> None:
    actual = with_gradients(function, *args)
    with use_backend("reference"):
        oracles = with_gradients(function, *(value.double() for value in args))
    for value, oracle, like in zip(actual, oracles, (args[0], *args), strict=True):
        assert value.dtype == like.dtype
        tolerance = max(TOLERANCE[args[0].dtype], TOLERANCE[like.dtype])
        scale = float(oracle.abs().max()) if oracle.numel() else 1.0
        torch.testing.assert_close(value.double(), oracle, rtol=tolerance, atol=tolerance * scale)
    assert actual[1].stride() == torch.empty_like(args[0]).stride()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2,), (5, 6), (2, 3, 600), (0, 4), (3, 0)])
def test_geglu(shape: tuple[int, ...], dtype: torch.dtype, triton_backend: torch.device) -> None:
    assert_agrees(ops.geglu, 2.0 * torch.randn(shape).to(triton_backend, dtype))


def test_geglu_keeps_the_tail_in_16_bits(triton_backend: torch.device) -> None:
    """The approximation is relative: also far below zero, where 1 + erf would have lost every digit."""
    gate = torch.linspace(-6.0, 6.0, 997, dtype=torch.float16)
    x = torch.stack((torch.full_like(gate, 1000.0), gate), dim=-1).to(triton_backend).requires_grad_()
    y = ops.geglu(x)
    wide = x.detach().double().requires_grad_()
    oracle = wide[:, 0] * wide[:, 1] * 0.5 * torch.special.erfc(wide[:, 1] * -(0.5**0.5))
    torch.testing.assert_close(y[:, 0].double(), oracle, rtol=6e-4, atol=2.0**-25)
    (grad,) = torch.autograd.grad(y.sum(), x)
    (expected,) = torch.autograd.grad(oracle.sum(), wide)
    torch.testing.assert_close(grad[:, 0].double(), expected[:, 0], rtol=6e-4, atol=2.0**-25)
    torch.testing.assert_close(grad[:, 1].double(), expected[:, 1], rtol=1e-3, atol=1e-2)


def test_geglu_of_what_is_not_finite(triton_backend: torch.device) -> None:
    gate = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e4, -1e4], dtype=torch.float16)
    y = ops.geglu(torch.stack((torch.ones_like(gate), gate), dim=-1).to(triton_backend))
    assert y.flatten().nan_to_num(7.0, 8.0).tolist() == [7.0, 8.0, 7.0, 1e4, 0.0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_geglu_in_low_precision(
    dtype: torch.dtype, triton_backend: torch.device, assert_twice_unfused: Callable[..., None]
) -> None:
    def unfused(x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        return a * torch.nn.functional.gelu(b)

    x = 2.0 * torch.randn(16, 200).to(triton_backend, dtype)
    results = [with_gradients(ops.geglu, x), with_gradients(unfused, x), with_gradients(unfused, x.double())]
    for actual, same_dtype, oracle in zip(*results, strict=True):
        assert_twice_unfused(actual, same_dtype, oracle)


def test_geglu_in_any_layout(layout: Callable[[Tensor], Tensor], triton_backend: torch.device) -> None:
    assert_agrees(ops.geglu, layout(torch.randn(2, 3, 4, 6).to(triton_backend)))


def modulated(*shape: int, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    scale, shift = torch.randn(2, shape[0], 1, shape[-1]).to(device, dtype)
    return torch.randn(shape).to(device, dtype), scale, shift


# One row, one sum of rows, several; a row of one element, of few, of many.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 1, 7), (1, 5, 1), (2, 19, 40), (3, 9, 300), (0, 3, 4)])
def test_ada_layer_norm(shape: tuple[int, ...], dtype: torch.dtype, triton_backend: torch.device) -> None:
    x, scale, shift = modulated(*shape, device=triton_backend, dtype=dtype)
    assert_agrees(lambda *args: ops.ada_layer_norm(*args, eps=1e-2), x, scale, shift)
    assert_agrees(lambda *args: ops.ada_layer_norm(*args, eps=1e-2), x, scale.float(), shift)


def test_many_partial_sums(triton_backend: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modulated_norm, "LEAST_ROWS", 1)
    assert_agrees(ops.ada_layer_norm, *modulated(2, modulated_norm.SUM_ROWS + 3, 70, device=triton_backend))


def test_ada_layer_norm_in_any_layout(layout: Callable[[Tensor], Tensor], triton_backend: torch.device) -> None:
    x, scale, shift = modulated(2, 3, 4, 6, device=triton_backend)
    assert_agrees(ops.ada_layer_norm, layout(x), scale[..., 0, :], shift.flatten(1).mT.contiguous().mT)


def test_each_gradient_only_where_needed(triton_backend: torch.device) -> None:
    x, scale, shift = modulated(2, 19, 5, device=triton_backend)
    rows, grad = scale.flatten(1), torch.randn(2, 19, 5, device=triton_backend)
    _, mean, rstd = kernels.forward(x, rows, shift.flatten(1), 1e-6)
    every = kernels.backward(grad, x, mean, rstd, rows, True, True, True)
    for needs in ((True, False, False), (False, True, False), (False, False, True), (False, False, False)):
        for value, expected, needed in zip(
            kernels.backward(grad, x, mean, rstd, rows, *needs), every, needs, strict=True
        ):
            assert torch.equal(value, expected) if needed else value is None


def test_mean_and_deviation_far_apart(triton_backend: torch.device) -> None:
    x = 3e4 + torch.randn(1, 3, 700).to(triton_backend)
    zero = torch.zeros(1, 700, device=triton_backend)
    _, mean, rstd = kernels.forward(x, zero, zero, 0.0)
    variance, expected = torch.var_mean(x.double(), dim=2, correction=0)
    torch.testing.assert_close(mean, expected.float(), rtol=1.2e-7, atol=0.0)
    torch.testing.assert_close(rstd, variance.rsqrt().float(), rtol=2e-6, atol=0.0)


def test_rows_too_wide_are_refused_by_name(triton_backend: torch.device) -> None:
    x, scale, shift = modulated(1, 1, modulated_norm.MOST_COLUMNS + 1, device=triton_backend)
    with pytest.raises(ValueError, match=r"backend 'triton' serves rows of up to 8192 elements, x has 8193"):
        ops.ada_layer_norm(x, scale, shift)
