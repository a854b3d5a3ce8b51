"""The gated linear unit, against torch's own gelu in float64."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from diffpp_fast import ops

pytestmark = pytest.mark.usefixtures("backend")

F64 = torch.float64


def formula(x: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return a * F.gelu(b)


@pytest.mark.parametrize("shape", [(2,), (3, 2), (2, 5, 14), (2, 3, 4, 6), (1, 2, 6 * 2048 + 2)])
def test_formula_and_gradient(shape: tuple[int, ...]) -> None:
    x = 3.0 * torch.randn(shape, dtype=F64)
    x.requires_grad_()
    y, oracle = ops.geglu(x), formula(x)
    torch.testing.assert_close(y, oracle)
    outer = torch.randn_like(y)
    (grad,), (expected,) = (torch.autograd.grad(value, x, outer) for value in (y, oracle))
    torch.testing.assert_close(grad, expected)


def test_gradcheck() -> None:
    torch.autograd.gradcheck(ops.geglu, torch.randn(2, 3, 6, dtype=F64, requires_grad=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype, assert_twice_unfused: Callable[..., None]) -> None:
    x = (2.0 * torch.randn(4, 16, 128)).to(dtype).requires_grad_()
    wide = x.detach().double().requires_grad_()
    outer = torch.randn(4, 16, 64).to(dtype)
    results = []
    for function, leaf in ((ops.geglu, x), (formula, x), (formula, wide)):
        y = function(leaf)
        results.append((y.detach(), *torch.autograd.grad(y, leaf, outer.to(y.dtype))))
    for actual, unfused, oracle in zip(*results, strict=True):
        assert_twice_unfused(actual, unfused, oracle)


def test_gelu_at_every_magnitude() -> None:
    ends = torch.tensor([0.0, 1e-40, 5.0, 9.0, 13.0, 13.3, 20.0, 1e4, 3e38])
    gate = torch.cat((torch.linspace(-14.0, 14.0, 2001), ends, -ends))
    x = torch.stack((torch.ones_like(gate), gate), dim=-1).requires_grad_()
    y = ops.geglu(x)
    (grad,) = torch.autograd.grad(y.sum(), x)
    b = gate.double()
    below = 0.5 * torch.special.erfc(-b / 2**0.5)
    torch.testing.assert_close(y[:, 0].double(), b * below, rtol=2e-6, atol=5e-7)
    density = torch.exp(-0.5 * b.square()) / (2.0 * torch.pi) ** 0.5
    torch.testing.assert_close(grad[:, 1].double(), below + b * density, rtol=2e-6, atol=5e-7)
    assert ops.geglu(torch.tensor([1.0, float("nan")])).isnan().all()


def test_layouts(layout: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(2, 4, 5, 6)
    y = ops.geglu(x.requires_grad_())
    outer = torch.randn_like(y)
    (expected,) = torch.autograd.grad(y, x, outer)
    laid_out = layout(x.detach()).requires_grad_()
    actual = ops.geglu(laid_out)
    torch.testing.assert_close(actual, y)
    assert actual.is_contiguous()
    (grad,) = torch.autograd.grad(actual, laid_out, layout(outer))
    torch.testing.assert_close(grad, expected)
    assert grad.stride() == torch.empty_like(laid_out).stride()


def test_only_the_input_is_kept() -> None:
    x = torch.randn(4, 64, 128, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        ops.geglu(x)
    assert [tensor.data_ptr() for tensor in kept] == [x.data_ptr()]


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_empty(shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape, requires_grad=True)
    y = ops.geglu(x)
    assert y.shape == (*shape[:-1], shape[-1] // 2)
    y.sum().backward()
    assert x.grad is not None and x.grad.shape == shape


def test_errors_name_what_is_wrong() -> None:
    with pytest.raises(ValueError, match=r"geglu: x must have shape \[..., 2 D\], got \[2, 3\]"):
        ops.geglu(torch.randn(2, 3))
    with pytest.raises(ValueError, match=r"geglu: x must have shape"):
        ops.geglu(torch.randn(()))
    with pytest.raises(TypeError, match="geglu: x must be float32, bfloat16, float16 or float64"):
        ops.geglu(torch.ones(2, dtype=torch.int64))
